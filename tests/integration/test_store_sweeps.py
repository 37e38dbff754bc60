"""What rescue does to rows when leases, messages and deadlines are lost."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from app.errors import LeaseLost
from app.jobs import ALONE_AFTER, MAX_UNCHARGED, JobState
from app.store import cancellation, delivery, sweeps, workers
from app.store.database import Database
from app.store.releases import Released
from tests.rows import MODEL, Worker, column, end_lease, insert, new_job, rewrite, view


def expire_leases(database: Database, page: int = 100) -> list[Released]:
    with database.begin() as connection:
        return sweeps.expire_leases(connection, sweeps.find_lost(connection, page))


def test_jobs_of_a_dead_worker_are_queued_again_and_not_charged(database: Database) -> None:
    ids = insert(database, new_job(), new_job())
    worker = Worker.registered(database)
    worker.claim(ids)
    end_lease(database, worker.id)

    rescued = expire_leases(database)

    assert {(each.job_id, each.state) for each in rescued} == {
        (job_id, JobState.QUEUED) for job_id in ids
    }
    job = view(database, ids[0])
    assert (job.state, job.attempts_charged) == (JobState.QUEUED, 0)
    [attempt] = job.attempts
    assert (attempt.outcome, attempt.charged) == ("lost", False)
    assert (attempt.device_ns, attempt.wasted_ns, attempt.cost) == (0, 0, 0)
    assert column(database, ids[0], "losses") == 1
    with database.begin() as connection:
        assert {each.id for each in delivery.send_due(connection, MODEL, [0], 10)} >= set(ids)


def lose_worker(database: Database, *ids: UUID) -> None:
    """A worker claims these jobs and dies."""
    worker = Worker.registered(database)
    worker.claim(ids)
    end_lease(database, worker.id)
    expire_leases(database)


def test_only_losses_alone_are_charged_and_the_last_of_them_says_how_often(
    database: Database,
) -> None:
    [job_id] = insert(database, new_job(max_attempts=2))

    for _ in range(ALONE_AFTER + 2):
        lose_worker(database, job_id)

    job = view(database, job_id)
    assert [each.charged for each in job.attempts] == [False] * ALONE_AFTER + [True, True]
    assert job.state is JobState.FAILED
    assert job.result is not None
    assert job.result.error_code == "worker_lost"
    assert job.result.error_message == (
        "The worker was lost 5 times while it ran the job, 2 of them with nothing else running."
    )


def test_a_job_that_is_interrupted_without_end_fails_at_last(database: Database) -> None:
    [job_id] = insert(database, new_job(max_attempts=1))
    worker = Worker.registered(database)

    states = []
    while JobState.FAILED not in states:
        [claimed] = worker.claim([job_id])
        states.append(worker.release(claimed))

    job = view(database, job_id)
    assert len(states) == MAX_UNCHARGED
    assert job.attempts_charged == 0
    assert job.result is not None
    assert job.result.error_code == "attempts_exhausted"


def test_a_cancel_is_not_forgotten_when_the_worker_dies(database: Database) -> None:
    [job_id] = insert(database, new_job())
    worker = Worker.registered(database)
    worker.claim([job_id])
    with database.begin() as connection:
        cancellation.cancel(connection, job_id)
    end_lease(database, worker.id)

    assert [each.state for each in expire_leases(database)] == [JobState.CANCELLED]


def test_a_live_worker_keeps_its_jobs(database: Database) -> None:
    ids = insert(database, new_job())
    Worker.registered(database).claim(ids)

    assert expire_leases(database) == []


def test_a_heartbeat_that_comes_late_but_before_rescue_loses_nothing(database: Database) -> None:
    ids = insert(database, new_job())
    worker = Worker.registered(database)
    [claimed] = worker.claim(ids)
    end_lease(database, worker.id)

    assert worker.heartbeat().held == {claimed.attempt_id}
    assert expire_leases(database) == []


def test_a_heartbeat_after_rescue_says_what_is_gone_and_the_worker_goes_on(
    database: Database,
) -> None:
    first, second = insert(database, new_job(), new_job())
    worker = Worker.registered(database)
    worker.claim([first])
    end_lease(database, worker.id)
    expire_leases(database)

    assert worker.heartbeat().held == frozenset()
    [claimed] = worker.claim([second])
    assert worker.heartbeat().held == {claimed.attempt_id}


def test_a_heartbeat_names_what_was_cancelled_and_what_is_late(database: Database) -> None:
    ids = insert(database, new_job(), new_job(), new_job())
    worker = Worker.registered(database)
    grants = {each.job_id: each.attempt_id for each in worker.claim(ids)}
    with database.begin() as connection:
        cancellation.cancel(connection, ids[0])
    rewrite(database, "deadline = now()", ids[1])

    beat = worker.heartbeat()

    assert beat == workers.Heartbeat(
        held=frozenset(grants.values()),
        cancel_requested=frozenset({grants[ids[0]]}),
        past_deadline=frozenset({grants[ids[1]]}),
    )


def test_a_worker_that_said_goodbye_is_rescued_at_once_and_cannot_come_back(
    database: Database,
) -> None:
    ids = insert(database, new_job())
    worker = Worker.registered(database)
    worker.claim(ids)

    worker.stop()

    assert len(expire_leases(database)) == 1
    with pytest.raises(LeaseLost):
        worker.heartbeat()


def test_a_worker_that_never_registered_has_no_lease(database: Database) -> None:
    with pytest.raises(LeaseLost):
        Worker(database).heartbeat()


def test_queued_jobs_past_their_deadline_expire_in_pages(database: Database) -> None:
    soon = datetime.now(UTC) + timedelta(hours=1)
    ids = insert(database, *(new_job(deadline=soon) for _ in range(5)), new_job())
    running = ids[4]
    Worker.registered(database).claim([running])
    for job_id in ids[:5]:
        rewrite(database, "deadline = now() - interval '1 s'", job_id)

    pages = []
    for _ in range(3):
        with database.begin() as connection:
            late = sweeps.find_late(connection, 3)
            pages.append(sweeps.expire_deadlines(connection, late))

    assert [len(page) for page in pages] == [3, 1, 0]
    expired = view(database, pages[0][0])
    assert expired.state is JobState.EXPIRED
    assert expired.result is not None
    assert expired.result.error_code == "deadline_exceeded"
    assert view(database, running).state is JobState.RUNNING  # its worker ends it


def test_two_rescue_processes_share_the_work(database: Database) -> None:
    ids = insert(database, *(new_job() for _ in range(6)))
    dead = Worker.registered(database)
    dead.claim(ids[:4])
    end_lease(database, dead.id)

    with database.begin() as one, database.begin() as other:
        first = sweeps.expire_leases(one, sweeps.find_lost(one, 3))
        second = sweeps.expire_leases(other, sweeps.find_lost(other, 3))
        unsent_first = delivery.send_due(one, MODEL, range(10), 1)
        unsent_second = delivery.send_due(other, MODEL, range(10), 1)

    assert (len(first), len(second)) == (3, 1)
    assert not {each.job_id for each in first} & {each.job_id for each in second}
    assert {each.id for each in unsent_first}.isdisjoint(each.id for each in unsent_second)


def test_a_stranger_in_running_is_lost_like_any_other(database: Database) -> None:
    """A worker's row may be gone, say after a restore from a backup."""
    ids = insert(database, new_job())
    Worker.registered(database).claim(ids)
    rewrite(database, f"worker_id = '{uuid4()}'", ids[0])

    assert [each.state for each in expire_leases(database)] == [JobState.QUEUED]
