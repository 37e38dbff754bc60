"""Two connections that want the same row, in an order that is certain.

The first move's transaction stays open until Postgres says that the second one waits for it.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, text

from app.errors import JobStateConflict
from app.jobs import AttemptOutcome, JobState
from app.store import cancellation, claims, purging, reads, releases, submissions, sweeps, workers
from app.store.claims import Claimed, Member
from app.store.database import Database
from app.store.reads import JobView
from app.store.releases import Release
from app.store.submissions import Incoming, Inserted, RejectedJob
from tests.rows import (
    Worker,
    completed,
    counting,
    end_lease,
    insert,
    new_job,
    view,
    where_it_is,
)
from tests.waiting import eventually

T = TypeVar("T")
Move = Callable[[Connection], T]


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """Whoever waits for a row may do so for as long as a busy machine makes it."""
    database = Database(database_url, lock_timeout_ms=60_000, statement_timeout_ms=90_000)
    yield database
    database.close()


class TakenBack(Exception):
    """The first transaction is to be rolled back."""


def race(
    database: Database, first: Move[Any], then: Move[T], *, is_taken_back: bool = False
) -> tuple[Any, T]:
    """Begin `first`; commit it, or take it back, once `then` waits for it. Both answers."""

    def run_then() -> T:
        with database.begin() as connection:
            return then(connection)

    with ThreadPoolExecutor(1) as pool:
        with suppress(TakenBack), database.begin() as connection:
            answer = first(connection)
            late = pool.submit(run_then)
            pid = connection.scalar(text("SELECT pg_backend_pid()"))
            eventually(lambda: _num_waiting_for(database, pid), timeout_s=60)
            if is_taken_back:
                raise TakenBack
        return answer, late.result()


def _num_waiting_for(database: Database, pid: int | None) -> int:
    with database.begin() as connection:
        waiting = text(
            "SELECT count(*) FROM pg_stat_activity WHERE :pid = ANY(pg_blocking_pids(pid))"
        )
        return connection.scalar(waiting, {"pid": pid}) or 0


def running(database: Database, **given: Any) -> tuple[Worker, Claimed]:
    """A job that a worker has claimed."""
    worker = Worker.registered(database)
    [claimed] = worker.claim(insert(database, new_job(**given)))
    return worker, claimed


def claim(worker: Worker, job_id: UUID) -> Move[list[Claimed]]:
    return lambda connection: claims.claim(connection, worker.batch(), [Member(job_id, uuid4())])


def finish(claimed: Claimed) -> Move[set[UUID]]:
    return lambda connection: counting(claims.finish(connection, [completed(claimed)]))


def release(claimed: Claimed) -> Move[list[releases.Released]]:
    given = Release(
        job_id=claimed.job_id,
        attempt_id=claimed.attempt_id,
        created_at=claimed.created_at,
        outcome=AttemptOutcome.RELEASED,
        charged=False,
    )
    return lambda connection: releases.release(connection, [given])


def cancel(job_id: UUID) -> Move[JobState | None]:
    """None if it was too late."""

    def move(connection: Connection) -> JobState | None:
        with suppress(JobStateConflict):
            return cancellation.cancel(connection, job_id)
        return None

    return move


def expire(connection: Connection) -> list[releases.Released]:
    return sweeps.expire_leases(connection, sweeps.find_lost(connection, 10))


def test_of_two_claims_the_second_waits_and_gets_nothing(database: Database) -> None:
    [job_id] = insert(database, new_job())
    one, other = Worker.registered(database), Worker.registered(database)

    first, second = race(database, claim(one, job_id), claim(other, job_id))

    assert (len(first), second) == (1, [])
    assert view(database, job_id).attempt == 1


def test_a_claim_that_died_before_its_commit_leaves_the_job_to_the_next(database: Database) -> None:
    [job_id] = insert(database, new_job())
    one, other = Worker.registered(database), Worker.registered(database)

    _, second = race(database, claim(one, job_id), claim(other, job_id), is_taken_back=True)

    assert [each.number for each in second] == [1]


def test_a_cancel_that_comes_during_a_finish_is_too_late(database: Database) -> None:
    _, claimed = running(database)

    counted, answer = race(database, finish(claimed), cancel(claimed.job_id))

    assert (counted, answer) == ({claimed.attempt_id}, None)
    assert view(database, claimed.job_id).state is JobState.COMPLETED


def test_a_finish_that_comes_during_a_cancel_counts_all_the_same(database: Database) -> None:
    _, claimed = running(database)

    answer, counted = race(database, cancel(claimed.job_id), finish(claimed))

    assert (answer, counted) == (JobState.RUNNING, {claimed.attempt_id})
    assert view(database, claimed.job_id).state is JobState.COMPLETED


def test_a_release_that_comes_during_a_cancel_ends_the_job(database: Database) -> None:
    _, claimed = running(database)

    _, [released] = race(database, cancel(claimed.job_id), release(claimed))

    assert released.state is JobState.CANCELLED


def test_a_cancel_that_comes_during_a_release_ends_the_job_at_once(database: Database) -> None:
    _, claimed = running(database)

    [released], answer = race(database, release(claimed), cancel(claimed.job_id))

    assert (released.state, answer) == (JobState.QUEUED, JobState.CANCELLED)
    assert view(database, claimed.job_id).state is JobState.CANCELLED


def test_a_zombie_that_finishes_during_its_rescue_changes_nothing(database: Database) -> None:
    zombie, claimed = running(database)
    end_lease(database, zombie.id)

    [rescued], counted = race(database, expire, finish(claimed))

    assert (rescued.state, counted) == (JobState.QUEUED, set())
    assert view(database, claimed.job_id).state is JobState.QUEUED


def test_a_zombie_that_finishes_while_its_rescue_dies_is_in_time(database: Database) -> None:
    zombie, claimed = running(database)
    end_lease(database, zombie.id)

    _, counted = race(database, expire, finish(claimed), is_taken_back=True)

    assert counted == {claimed.attempt_id}
    assert view(database, claimed.job_id).state is JobState.COMPLETED


def test_rescue_leaves_alone_what_is_being_finished(database: Database) -> None:
    zombie, claimed = running(database)
    end_lease(database, zombie.id)

    with database.begin() as finishing, database.begin() as sweeping:
        assert finish(claimed)(finishing) == {claimed.attempt_id}
        assert expire(sweeping) == []

    assert view(database, claimed.job_id).state is JobState.COMPLETED


def test_a_rescue_that_dies_leaves_its_page_to_the_other(database: Database) -> None:
    worker, claimed = running(database)
    end_lease(database, worker.id)

    with suppress(TakenBack), database.begin() as dying, database.begin() as other:
        assert len(expire(dying)) == 1
        assert expire(other) == []
        raise TakenBack
    with database.begin() as other:
        assert [each.job_id for each in expire(other)] == [claimed.job_id]


def test_a_job_that_is_rescued_during_a_heartbeat_is_missing_from_the_next(
    database: Database,
) -> None:
    worker, claimed = running(database)
    end_lease(database, worker.id)

    with database.begin() as beating:
        beat = workers.heartbeat(beating, worker.id, 30.0)
        with database.begin() as sweeping:
            assert len(expire(sweeping)) == 1

    assert beat.held == {claimed.attempt_id}  # true when it was asked
    assert worker.heartbeat().held == frozenset()
    assert worker.complete([claimed]) == set()


@pytest.mark.parametrize("is_taken_back", [False, True])
def test_a_key_that_another_transaction_is_writing_decides_when_that_ends(
    database: Database, is_taken_back: bool
) -> None:
    def submit(connection: Connection) -> Inserted:
        return submissions.insert_jobs(connection, [new_job(idempotency_key="k")])[0]

    first, second = race(database, submit, submit, is_taken_back=is_taken_back)

    assert second.created is is_taken_back
    assert (second.id == first.id) is not is_taken_back


def test_a_message_that_arrives_during_a_cancel_finds_the_job_ended(database: Database) -> None:
    [job_id] = insert(database, new_job())
    worker = Worker.registered(database)

    _, received = race(
        database,
        cancel(job_id),
        lambda connection: submissions.receive(connection, worker.id, [Incoming(job_id)]),
    )

    assert received[job_id].state is JobState.CANCELLED


def receive_whole(worker: Worker, job_id: UUID) -> Move[dict[UUID, submissions.Received]]:
    """A message that brings all of a job, as a producer sends it, or somebody who forges it."""
    arrivals = [Incoming(job_id, new_job(id=job_id, source="message"))]
    return lambda connection: submissions.receive(connection, worker.id, arrivals)


def test_a_whole_message_that_comes_while_its_job_ends_finds_it_and_writes_nothing(
    database: Database,
) -> None:
    worker, claimed = running(database)

    _, received = race(database, finish(claimed), receive_whole(worker, claimed.job_id))

    assert received[claimed.job_id].state is JobState.COMPLETED
    assert rows_of(database, claimed.job_id) == {"job_keys": 1, "open_jobs": 0, "results": 1}


def test_a_whole_message_that_comes_while_its_job_is_cancelled_finds_it_cancelled(
    database: Database,
) -> None:
    [job_id] = insert(database, new_job())
    worker = Worker.registered(database)

    _, received = race(database, cancel(job_id), receive_whole(worker, job_id))

    assert received[job_id].state is JobState.CANCELLED
    assert rows_of(database, job_id) == {"job_keys": 1, "open_jobs": 0, "results": 1}


@pytest.mark.parametrize("is_taken_back", [False, True])
def test_of_two_whole_messages_at_once_one_writes_the_job_and_both_hear_of_it(
    database: Database, is_taken_back: bool
) -> None:
    job_id = uuid4()
    one, other = Worker.registered(database), Worker.registered(database)

    _, received = race(
        database,
        receive_whole(one, job_id),
        receive_whole(other, job_id),
        is_taken_back=is_taken_back,
    )

    assert received[job_id].state is JobState.QUEUED
    assert rows_of(database, job_id) == {"job_keys": 1, "open_jobs": 1, "results": 0}


def test_a_refused_message_that_comes_while_its_job_is_written_changes_nothing(
    database: Database,
) -> None:
    job = new_job(source="message")
    bad = RejectedJob(id=job.id, kind=job.kind, error_code="bad", error_message="Bad.")
    worker = Worker.registered(database)

    _, written = race(
        database,
        receive_whole(worker, job.id),
        lambda connection: submissions.reject(connection, [bad]),
    )

    assert written == set()
    assert rows_of(database, job.id) == {"job_keys": 1, "open_jobs": 1, "results": 0}


def test_a_key_and_a_replay_stay_taken_while_their_job_ends(database: Database) -> None:
    # given a running job with a key, which replays another
    replayed = uuid4()
    _, claimed = running(database, idempotency_key="k", replay_of=replayed)
    with database.begin() as ending:
        finish(claimed)(ending)

        # when the same is submitted while it ends, and after that
        again = [new_job(idempotency_key="k"), new_job(replay_of=replayed)]
        with database.begin() as connection:
            answers = submissions.insert_jobs(connection, again)
    with database.begin() as connection:
        answers += submissions.insert_jobs(connection, again)

    # then it is that job
    assert {(each.id, each.created) for each in answers} == {(claimed.job_id, False)}


@pytest.mark.parametrize("is_finished_first", [True, False])
def test_a_job_that_is_purged_while_it_ends_says_nothing_afterwards(
    database: Database, is_finished_first: bool
) -> None:
    _, claimed = running(database, request={"prompt": "a secret"}, metadata={"of": "a secret"})
    says = completed(claimed, response={"text": "a secret"})
    moves: list[Move[Any]] = [
        lambda connection: claims.finish(connection, [says]),
        lambda connection: purging.purge(connection, claimed.job_id),
    ]

    race(database, *(moves if is_finished_first else moves[::-1]))

    assert view(database, claimed.job_id).state is JobState.COMPLETED
    assert where_it_is(database, "a secret") == set()


def test_every_look_finds_every_job_in_one_state_while_jobs_end(database: Database) -> None:
    """Messages come late, doubled and forged, lists and states are asked for, and jobs end."""
    ids = insert(database, *(new_job() for _ in range(60)))
    others = [Worker.registered(database) for _ in range(2)]
    is_over = threading.Event()

    def work(worker: Worker) -> int:
        done = 0
        for group in (ids[n : n + 3] for n in range(0, len(ids), 3)):
            done += len(worker.complete(worker.claim(group)))
        return done

    def forge(worker: Worker) -> None:
        seen: dict[UUID, JobState] = {}
        while not is_over.is_set():
            some = random.Random(len(seen)).sample(ids, 5)
            arrivals = [Incoming(id, new_job(id=id, source="message")) for id in some]
            for id, row in worker.receive(*arrivals).items():
                before = seen.get(id, JobState.QUEUED)
                assert before is row.state or not before.is_final
                seen[id] = row.state
            assert seen.keys() >= set(some)  # whatever happens just then

    def look() -> None:
        while not is_over.is_set():
            with database.begin() as connection:
                assert reads.states(connection, ids).keys() == set(ids)
                views = reads.find(connection, ids)
            assert [each.id for each in views] == ids
            assert all(
                (each.result is not None) == each.state.is_final
                for each in views
                if isinstance(each, JobView)
            )

    with ThreadPoolExecutor(5) as pool:
        lookers = [pool.submit(forge, worker) for worker in others] + [pool.submit(look)]
        try:
            done = sum(pool.map(work, [Worker.registered(database) for _ in range(2)]))
        finally:
            is_over.set()
        for looker in lookers:
            looker.result()

    assert done == len(ids)
    with database.begin() as connection:
        for table, number in (("job_keys", 60), ("open_jobs", 0), ("results", 60)):
            assert connection.scalar(text(f"SELECT count(*) FROM {table}")) == number, table


def rows_of(database: Database, job_id: UUID) -> dict[str, int]:
    """How many rows a job has, by table."""
    with database.begin() as connection:
        return {
            table: connection.scalar(
                text(f"SELECT count(*) FROM {table} WHERE {key} = :id"), {"id": job_id}
            )
            or 0
            for table, key in (("job_keys", "id"), ("open_jobs", "id"), ("results", "job_id"))
        }
