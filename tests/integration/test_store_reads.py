"""Status, lists and counts."""

from __future__ import annotations

from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from app.errors import GristmillError, JobNotFound
from app.jobs import EARLIEST, LATEST, JobState
from app.store import cancellation, counts, lists, reads
from app.store.counts import QueueDepth
from app.store.database import Database
from app.store.lists import Filter
from app.store.reads import JobView, Unreadable
from app.store.submissions import Incoming
from tests.rows import MODEL, Worker, insert, insert_sent, new_job, rewrite, view


def pages(database: Database, limit: int, **filters: Any) -> list[UUID]:
    """All ids of a listing, page by page."""
    ids: list[UUID] = []
    while True:
        with database.begin() as connection:
            page = reads.list_jobs(
                connection, Filter(**filters), limit=limit, after=ids[-1] if ids else None
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
    assert set(pages(database, 2, states=[JobState.CANCELLED])) == {ids[0], ids[4]}
    assert pages(database, 2, states=[JobState.CANCELLED], model="b") == [ids[4]]


def test_a_list_can_be_of_labels_a_key_and_a_time(database: Database) -> None:
    labels = [{"customer": "42", "line": str(n)} for n in range(5)] + [{"customer": "43"}, {}]
    ids = insert(database, *(new_job(metadata=each) for each in labels))
    [keyed] = insert(database, new_job(idempotency_key="order", metadata={"customer": "42"}))
    rewrite(database, "created_at = now() - interval '1 h'", ids[0])
    with database.begin() as connection:
        cancellation.cancel(connection, ids[1])
        then = connection.scalar(text("SELECT now() - interval '30 min'"))
        assert reads.list_jobs(connection, Filter(metadata={"customer": "42"}), tenant="x") == []

    assert set(pages(database, 2, metadata={"customer": "42"})) == {*ids[:5], keyed}
    assert pages(database, 2, metadata={"customer": "42", "line": "3"}) == [ids[3]]
    assert pages(database, 2, metadata={"customer": "42", "line": "9"}) == []
    assert pages(database, 2, metadata={"customer": "42"}, until=then) == [ids[0]]
    assert set(pages(database, 2, metadata={"customer": "43"}, since=then)) == {ids[5]}
    cancelled = {"states": [JobState.CANCELLED], "error_code": "cancelled"}
    assert pages(database, 2, metadata={"customer": "42"}, **cancelled) == [ids[1]]
    assert pages(database, 2, idempotency_key="order") == [keyed]
    assert pages(database, 2, idempotency_key="order", model="other") == []
    assert pages(database, 2, idempotency_key="orders") == []


def test_labels_that_many_jobs_have_are_listed_the_same(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = [{"customer": str(n % 3), "n": str(n)} for n in range(12)]
    ids = insert(database, *(new_job(metadata=each) for each in labels))
    with database.begin() as connection:
        cancellation.cancel(connection, ids[3])
    asked: list[dict[str, Any]] = [
        {"metadata": {"customer": "0"}},
        {"metadata": {"customer": "0"}, "states": [JobState.CANCELLED]},
        {"metadata": {"customer": "0"}, "error_code": "cancelled"},
        {"metadata": {"customer": "1"}, "model": MODEL},
    ]
    few = [pages(database, 2, **each) for each in asked]

    monkeypatch.setattr(lists, "MANY", 1)

    assert [pages(database, 2, **each) for each in asked] == few
    assert [len(each) for each in few] == [4, 1, 1, 4]


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
    ids = insert_sent(database, *(new_job() for _ in range(5)), new_job(model="other"))
    with database.begin() as connection:
        cancellation.cancel(connection, ids[4])
    worker = Worker.registered(database)
    worker.receive(Incoming(ids[0]))
    worker.claim([ids[1]])

    with database.begin() as connection:
        assert counts.queue_depths(connection) == [
            QueueDepth("other", JobState.QUEUED, 1),
            QueueDepth(MODEL, JobState.QUEUED, 3),
            QueueDepth(MODEL, JobState.RUNNING, 1),
        ]


def test_the_oldest_queued_job_of_a_model_has_an_age(database: Database) -> None:
    oldest, *_ = insert(database, new_job(), new_job(), new_job(model="other"))
    rewrite(database, "created_at = now() - interval '1 h'", oldest)

    with database.begin() as connection:
        ages = counts.oldest_queued_s(connection, [MODEL, "other", "idle"])

    assert ages[MODEL] >= 3600 > ages["other"]
    assert "idle" not in ages


def by_hand(database: Database, job_id: UUID, assignment: str) -> None:
    """Write into a row what only the types of its columns forbid, not the constraints."""
    with database.begin() as connection:
        names = connection.scalars(
            text(
                "SELECT conname FROM pg_constraint WHERE conrelid = 'open_jobs'::regclass"
                " AND contype = 'c'"
            )
        ).all()
        for name in names:
            connection.execute(text(f"ALTER TABLE open_jobs DROP CONSTRAINT {name}"))
    rewrite(database, assignment, job_id)


DIGITS = "1" * 5_000
DEPTH = 3_000


@pytest.mark.parametrize(
    ("assignment", "is_readable"),
    [
        ("deadline = 'infinity'", True),
        ("not_before = '-infinity'", True),
        ("created_at = '4713-01-01 BC'", True),
        ("deadline = '290000-01-01'", True),
        ("deadline = '9999-12-31 23:59:59-05'", True),
        ("input_tokens = -7, priority = 1000", True),
        ("kind = 'paint', source = 'elsewhere', url = ''", True),
        ("state = 'thinking'", False),
        (f"metadata = '{DIGITS}'", False),
        (f"metadata = '{'[' * DEPTH}{']' * DEPTH}'", False),
    ],
)
def test_a_row_that_cannot_be_read_never_fails_anothers_read(
    database: Database, assignment: str, is_readable: bool
) -> None:
    # given a row written by hand between two good ones
    ids = insert(database, new_job(), new_job(), new_job())
    by_hand(database, ids[1], assignment)

    # when all are asked for
    with database.begin() as connection:
        found = reads.find(connection, ids)

    # then each is there, and the odd one as well as it can be
    assert [each.id for each in found] == ids
    assert isinstance(found[0], JobView)
    assert isinstance(found[2], JobView)
    assert isinstance(found[1], JobView if is_readable else Unreadable)


def test_times_without_end_are_read_as_the_last_there_are(database: Database) -> None:
    [job_id] = insert(database, new_job())
    by_hand(database, job_id, "deadline = 'infinity', not_before = '-infinity'")

    job = view(database, job_id)

    assert (job.not_before, job.deadline) == (EARLIEST, LATEST)


@pytest.mark.parametrize(
    "assignment",
    [
        "deadline = 'infinity'",
        "not_before = '-infinity'",
        "deadline = '9999-12-31 23:59:59-05'",
        "created_at = '0001-01-01 00:00+14'",
        "priority = 10",
        "priority = -2",
        "attempt = -1",
        "losses = -1",
        "input_tokens = -1",
        "max_output_tokens = 2147483647",
        "state = 'thinking'",
        "time_limit_s = 'infinity'",
        "time_limit_s = 'nan'",
        "format = 0",
        "metadata = '[]'",
        "model = repeat('m', 201)",
    ],
)
def test_the_schema_refuses_what_the_edge_would_not_write(
    database: Database, assignment: str
) -> None:
    [job_id] = insert(database, new_job())

    with pytest.raises(GristmillError):
        rewrite(database, assignment, job_id)
