"""Jobs that are claimed and read in one statement, as their messages come, on a real Postgres."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from app.errors import Unavailable
from app.jobs import SUSPECT_AFTER, JobState
from app.requests.bodies import FORMAT
from app.store import cancellation, claims, submissions
from app.store.claims import BatchStats, Member, Taken
from app.store.database import Database
from app.store.encoding import UNREADABLE
from app.store.submissions import Incoming
from tests.rows import Worker, column, end_lease, insert, insert_sent, new_job, rewrite, view


def take(worker: Worker, *ids: UUID) -> list[Taken]:
    with worker.database.begin() as connection:
        return claims.take(connection, worker.batch(), [Member(id, uuid4()) for id in ids])


@pytest.fixture
def worker(database: Database) -> Worker:
    return Worker.registered(database)


def test_a_take_opens_attempts_and_a_batch_and_reads_the_rows(
    worker: Worker, database: Database
) -> None:
    deadline = datetime.now(UTC) + timedelta(hours=1)
    job = new_job(deadline=deadline, priority=3, time_limit_s=7.0, stream_events=True)
    other = new_job()
    insert_sent(database, job, other)

    taken = {each.row.id: each for each in take(worker, job.id, other.id)}

    assert taken.keys() == {job.id, other.id}
    claimed, row = taken[job.id].claimed, taken[job.id].row
    stored = view(database, job.id)
    assert (claimed.job_id, claimed.number) == (job.id, 1)
    assert claimed.created_at == row.created_at == stored.created_at
    assert (row.request, row.url, row.model, row.kind) == (
        job.request, job.url, job.model, job.kind,
    )  # fmt: skip
    assert (row.deadline, row.priority, row.tenant) == (deadline, 3, job.tenant)
    assert (row.time_limit_s, row.stream_events, row.losses) == (7.0, True, 0)
    assert row.expires_in_s == pytest.approx(3600, abs=60)
    assert stored.state is JobState.RUNNING
    assert [(each.id, each.outcome) for each in stored.attempts] == [(claimed.attempt_id, None)]
    assert stored.batch is not None
    assert stored.batch.num_jobs == 2


def test_what_is_taken_was_received_then(worker: Worker, database: Database) -> None:
    [job_id] = insert_sent(database, new_job())
    sent_at = column(database, job_id, "enqueued_at")

    take(worker, job_id)

    assert column(database, job_id, "received_at") == column(database, job_id, "claimed_at")
    assert column(database, job_id, "enqueued_at") == sent_at


def test_what_its_worker_had_received_before_keeps_that_time(
    worker: Worker, database: Database
) -> None:
    # given a job that was received, and the answer was lost
    [job_id] = insert_sent(database, new_job())
    worker.receive(Incoming(job_id))
    received_at = column(database, job_id, "received_at")

    take(worker, job_id)

    assert column(database, job_id, "received_at") == received_at


def test_what_another_worker_had_received_is_received_anew(
    worker: Worker, database: Database
) -> None:
    [job_id] = insert_sent(database, new_job())
    Worker.registered(database).receive(Incoming(job_id))

    take(worker, job_id)

    assert column(database, job_id, "received_at") == column(database, job_id, "claimed_at")


def test_a_job_whose_message_nobody_knows_of_has_been_sent_once_it_is_taken(
    worker: Worker, database: Database
) -> None:
    [job_id] = insert(database, new_job())  # unsent, and its message came all the same
    assert column(database, job_id, "enqueued_at") is None

    assert take(worker, job_id)

    assert column(database, job_id, "enqueued_at") == column(database, job_id, "claimed_at")


def _cancel(database: Database, job_id: UUID) -> None:
    with database.begin() as connection:
        cancellation.cancel(connection, job_id)


def _remove(database: Database, job_id: UUID) -> None:
    with database.begin() as connection:
        connection.execute(text("DELETE FROM open_jobs WHERE id = :id"), {"id": job_id})


def _of_later_kind(database: Database, job_id: UUID) -> None:
    with database.begin() as connection:
        connection.execute(text("ALTER TABLE open_jobs DROP CONSTRAINT open_jobs_kind_check"))
    rewrite(database, "kind = 'later'", job_id)


NOT_GRANTED: dict[str, Callable[[Database, UUID], Any]] = {
    "of another model": lambda database, id: rewrite(database, "model = 'another'", id),
    "of a later kind": _of_later_kind,
    "of a later format": lambda database, id: rewrite(database, f"format = {FORMAT + 1}", id),
    "a suspect": lambda database, id: rewrite(database, f"losses = {SUSPECT_AFTER}", id),
    "cancelled": _cancel,
    "not due": lambda database, id: rewrite(database, "not_before = now() + interval '1 h'", id),
    "past its deadline": lambda database, id: rewrite(
        database, "deadline = now() - interval '1 s'", id
    ),
    "somebody else's": lambda database, id: Worker.registered(database).claim([id]),
    "unknown": _remove,
}


@pytest.mark.parametrize("why", NOT_GRANTED)
def test_a_job_that_is_not_to_run_in_this_batch_is_left_as_it_is(
    worker: Worker, database: Database, why: str
) -> None:
    # given a job that is to run, and one beside it that is not
    [good, bad] = insert_sent(database, new_job(), new_job())
    NOT_GRANTED[why](database, bad)
    row = "SELECT * FROM open_jobs WHERE id = :id"
    with database.begin() as connection:
        before = connection.execute(text(row), {"id": bad}).all()

    taken = take(worker, good, bad)

    assert [each.row.id for each in taken] == [good]
    with database.begin() as connection:
        assert connection.execute(text(row), {"id": bad}).all() == before


def test_one_that_was_lost_less_often_than_a_suspect_is_taken(
    worker: Worker, database: Database
) -> None:
    [job_id] = insert_sent(database, new_job())
    rewrite(database, f"losses = {SUSPECT_AFTER - 1}", job_id)

    [taken] = take(worker, job_id)

    assert taken.row.losses == SUSPECT_AFTER - 1


def test_a_take_that_gets_nothing_leaves_no_batch(worker: Worker, database: Database) -> None:
    assert take(worker, uuid4()) == []
    with database.begin() as connection:
        assert connection.scalar(text("SELECT count(*) FROM batches")) == 0


def test_a_repeated_take_is_the_same_take(worker: Worker, database: Database) -> None:
    ids = insert_sent(database, new_job(), new_job())
    batch, members = worker.batch(), [Member(id, uuid4()) for id in ids]

    with database.begin() as connection:
        first = claims.take(connection, batch, members)
    with database.begin() as connection:
        second = claims.take(connection, batch, members)

    def plain(taken: list[Taken]) -> dict[UUID, tuple[Any, Any]]:
        return {each.row.id: (each.claimed, each.row.request) for each in taken}

    assert plain(first) == plain(second)
    assert len(first) == 2
    with database.begin() as connection:
        assert connection.scalar(text("SELECT count(*) FROM attempts")) == 2
        assert connection.scalar(text("SELECT num_jobs FROM batches")) == 2


def test_a_worker_whose_lease_is_over_takes_nothing_until_its_next_heartbeat(
    worker: Worker, database: Database
) -> None:
    [job_id] = insert_sent(database, new_job())
    end_lease(database, worker.id)

    with pytest.raises(Unavailable, match="lease"):
        take(worker, job_id)
    assert view(database, job_id).state is JobState.QUEUED

    worker.heartbeat()
    assert len(take(worker, job_id)) == 1


def test_a_request_that_cannot_be_read_keeps_nobody_else_from_being_taken(
    worker: Worker, database: Database
) -> None:
    [good, deep, gone] = insert_sent(database, new_job(), new_job(), new_job())
    nested = "[" * 2_000 + "]" * 2_000
    with database.begin() as connection:
        change = text("UPDATE requests SET request = CAST(:to AS jsonb) WHERE job_id = :id")
        connection.execute(change, {"to": f'{{"prompt": {nested}}}', "id": deep})
        connection.execute(text("DELETE FROM requests WHERE job_id = :id"), {"id": gone})

    requests = {each.row.id: each.row.request for each in take(worker, good, deep, gone)}

    assert requests == {good: {"prompt": "A mill"}, deep: UNREADABLE, gone: None}


def test_a_batch_has_as_many_sequences_as_its_finish_says(
    worker: Worker, database: Database
) -> None:
    # given a batch whose claim did not know
    [job_id] = insert_sent(database, new_job())
    take(worker, job_id)
    stored = view(database, job_id).batch
    assert stored is not None
    assert stored.num_sequences == 1

    with database.begin() as connection:
        claims.finish(connection, [], [BatchStats(stored.id, 9, 12, 1, num_sequences=5)])

    after = view(database, job_id).batch
    assert after is not None
    assert after.num_sequences == 5
    with database.begin() as connection:
        sequences = connection.scalar(text("SELECT sum(sequences) FROM batch_usage"))
    assert sequences == 5


def test_who_receives_a_job_that_was_taken_learns_that_it_runs(
    worker: Worker, database: Database
) -> None:
    [job_id] = insert_sent(database, new_job())
    take(worker, job_id)

    with database.begin() as connection:
        rows = submissions.receive(connection, uuid4(), [Incoming(job_id)])

    assert rows[job_id].state is JobState.RUNNING
