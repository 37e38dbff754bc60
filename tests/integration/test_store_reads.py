"""Status, lists and counts."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest

from app.errors import JobNotFound
from app.jobs import JobState
from app.store import cancellation, reads, submissions
from app.store.database import Database
from app.store.reads import QueueDepth
from app.store.submissions import Arrival
from tests.rows import MODEL, Worker, insert, new_job, rewrite, view


def pages(database: Database, limit: int, **filters: object) -> list[UUID]:
    """All ids of a listing, page by page."""
    ids: list[UUID] = []
    while True:
        with database.begin() as connection:
            page = reads.list_jobs(
                connection, limit=limit, after=ids[-1] if ids else None, **filters
            )
        if not page:
            return ids
        ids += [job.id for job in page]


def test_a_job_that_waits_has_neither_result_nor_batch(database: Database) -> None:
    [job_id] = insert(database, new_job())

    job = view(database, job_id)

    assert (job.attempts, job.result, job.batch) == ((), None, None)


def test_a_job_of_another_tenant_is_not_there(database: Database) -> None:
    [job_id] = insert(database, new_job(tenant="bakery"))

    with database.begin() as connection:
        assert reads.find(connection, [job_id]) == []
        assert len(reads.find(connection, [job_id], tenant="bakery")) == 1
        assert reads.list_jobs(connection) == []
        with pytest.raises(JobNotFound):
            cancellation.cancel(connection, job_id)
        with pytest.raises(JobNotFound):
            reads.list_jobs(connection, after=job_id)


def test_pages_hold_every_job_once_newest_first_also_within_one_instant(
    database: Database,
) -> None:
    older = insert(database, *(new_job() for _ in range(7)))  # one transaction, one created_at
    newer = insert(database, *(new_job() for _ in range(7)))

    listed = pages(database, limit=3)

    assert set(listed[:7]) == set(newer)
    assert set(listed[7:]) == set(older)
    assert len(listed) == 14


def test_a_list_can_be_of_one_state_and_one_model(database: Database) -> None:
    ids = insert(database, *(new_job(model=model) for model in ("a", "b") for _ in range(4)))
    for job_id in (ids[0], ids[4]):
        with database.begin() as connection:
            cancellation.cancel(connection, job_id)

    assert set(pages(database, 2, model="a")) == set(ids[:4])
    assert set(pages(database, 2, state=JobState.CANCELLED)) == {ids[0], ids[4]}
    assert pages(database, 2, state=JobState.CANCELLED, model="b") == [ids[4]]


def test_a_list_leaves_responses_out(database: Database) -> None:
    ids = insert(database, new_job())
    worker = Worker.registered(database)
    worker.complete(worker.claim(ids))

    with database.begin() as connection:
        [listed] = reads.list_jobs(connection)

    status = view(database, ids[0])
    assert listed.result is not None
    assert status.result is not None
    assert (listed.result.response, status.result.response) == (None, {"choices": []})
    assert listed.result.total_ms == status.result.total_ms


def test_a_list_after_a_job_that_is_not_there_is_refused(database: Database) -> None:
    with pytest.raises(JobNotFound), database.begin() as connection:
        reads.list_jobs(connection, after=uuid4())


def test_states_are_told_of_the_jobs_that_exist(database: Database) -> None:
    [job_id] = insert(database, new_job())

    with database.begin() as connection:
        assert reads.states(connection, [job_id, uuid4()]) == {job_id: JobState.QUEUED}


def test_depths_count_open_jobs_by_model_and_state(database: Database) -> None:
    ids = insert(database, *(new_job() for _ in range(5)), new_job(model="other"))
    with database.begin() as connection:
        submissions.mark_enqueued(connection, ids)
        cancellation.cancel(connection, ids[4])
    worker = Worker.registered(database)
    worker.receive(Arrival(ids[0]))
    worker.claim([ids[1]])

    with database.begin() as connection:
        assert reads.queue_depths(connection) == [
            QueueDepth("other", JobState.QUEUED, 1),
            QueueDepth(MODEL, JobState.QUEUED, 3),
            QueueDepth(MODEL, JobState.RUNNING, 1),
        ]


def test_the_oldest_queued_job_of_a_model_has_an_age(database: Database) -> None:
    oldest, *_ = insert(database, new_job(), new_job(), new_job(model="other"))
    rewrite(database, "created_at = now() - interval '1 h'", oldest)

    with database.begin() as connection:
        ages = reads.oldest_queued_s(connection, [MODEL, "other", "idle"])

    assert ages[MODEL] >= 3600 > ages["other"]
    assert "idle" not in ages
