"""What rescue does to rows when leases, messages and deadlines are lost."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from app.errors import LeaseLost
from app.jobs import ALONE_AFTER, MAX_UNCHARGED, JobState
from app.store import cancellation, submissions, sweeps, workers
from app.store.claims import Released
from app.store.database import Database
from app.store.submissions import Arrival
from tests.rows import MODEL, Worker, column, end_lease, insert, new_job, rewrite, view


def expire_leases(database: Database, page: int = 100) -> list[Released]:
    with database.begin() as connection:
        return sweeps.expire_leases(connection, page)


def unsent(database: Database, grace_s: float = 0.0) -> set[UUID]:
    with database.begin() as connection:
        return {wake_up.id for wake_up in sweeps.unsent(connection, MODEL, range(10), 100, grace_s)}


def overdue(database: Database, lost_after_s: float = 10.0, page: int = 100) -> list[UUID]:
    with database.begin() as connection:
        found = sweeps.overdue(connection, MODEL, lost_after_s, page)
    return [wake_up.id for wake_up in found]


def send(database: Database, *ids: UUID) -> None:
    with database.begin() as connection:
        submissions.mark_enqueued(connection, ids)


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
    assert [(each.outcome, each.charged, each.device_ns) for each in job.attempts] == [
        ("lost", False, None)
    ]
    assert column(database, ids[0], "losses") == 1
    assert set(ids) <= unsent(database)


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


def test_what_a_dead_worker_had_received_is_sent_again(database: Database) -> None:
    ids = insert(database, new_job(), new_job())
    dead, alive = Worker.registered(database), Worker.registered(database)
    dead.receive(Arrival(ids[0]))
    alive.receive(Arrival(ids[1]))
    end_lease(database, dead.id)

    with database.begin() as connection:
        assert sweeps.return_received(connection, 100) == 1

    assert unsent(database) == {ids[0]}


def test_a_job_that_was_never_sent_is_found_once_it_is_due_and_its_sender_had_time(
    database: Database,
) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    sent, never, early = insert(database, new_job(), new_job(), new_job(not_before=later))
    send(database, sent)

    assert unsent(database, grace_s=60.0) == set()
    assert unsent(database) == {never}
    rewrite(database, "not_before = now()", early)
    assert unsent(database) == {never, early}


def test_jobs_of_a_kind_that_only_a_later_version_knows_are_left_to_it(database: Database) -> None:
    never, sent, known = insert(database, new_job(), new_job(), new_job())
    send(database, sent)
    with database.begin() as connection:
        connection.execute(text("ALTER TABLE jobs DROP CONSTRAINT jobs_kind_check"))
    for job_id in (never, sent):
        rewrite(database, "kind = 'rerank'", job_id)
    rewrite(database, "enqueued_at = now() - interval '1 day'", sent)

    assert unsent(database) == {known}
    assert overdue(database) == []


def test_what_was_never_sent_is_found_by_model_urgent_jobs_first_and_then_old_ones(
    database: Database,
) -> None:
    patient, young, old, other = insert(
        database,
        new_job(priority=2),
        new_job(priority=1),
        new_job(priority=1),
        new_job(model="other"),
    )
    rewrite(database, "not_before = now() - interval '1 hour'", old)
    rewrite(database, "not_before = now() - interval '2 hours'", patient)

    with database.begin() as connection:
        assert sweeps.unsent_models(connection) == sorted([MODEL, "other"])
        found = sweeps.unsent(connection, MODEL, [0, 1, 2], 100, 0.0)
        assert [each.id for each in found] == [old, young, patient]
        assert len(sweeps.unsent(connection, MODEL, [0, 1, 2], 2, 0.0)) == 2
        assert [each.id for each in sweeps.unsent(connection, "other", [0], 9, 0.0)] == [other]


def test_a_message_is_overdue_twice_as_late_each_time_it_is_sent(database: Database) -> None:
    [job_id] = insert(database, new_job())
    send(database, job_id)
    limits_s = []
    for _ in range(3):
        age_s = 5
        while not overdue(database):
            age_s += 5
            rewrite(database, f"enqueued_at = now() - interval '{age_s} s'", job_id)
        limits_s.append(age_s)
        send(database, job_id)

    assert limits_s == [10, 20, 40]


def test_overdue_messages_come_oldest_first_and_only_of_their_model(database: Database) -> None:
    ids = insert(database, *(new_job() for _ in range(4)), new_job(model="other"))
    send(database, *ids)
    for age, job_id in enumerate(ids):
        rewrite(database, f"enqueued_at = now() - interval '{100 + age} s'", job_id)

    assert overdue(database, page=3) == [ids[3], ids[2], ids[1]]


def test_a_message_that_was_received_is_not_overdue(database: Database) -> None:
    [job_id] = insert(database, new_job())
    send(database, job_id)
    rewrite(database, "enqueued_at = now() - interval '1 h'", job_id)
    assert overdue(database) == [job_id]

    Worker.registered(database).receive(Arrival(job_id))

    assert overdue(database) == []


def test_the_length_that_queues_should_have_is_counted_by_model(database: Database) -> None:
    ids = insert(database, *(new_job() for _ in range(4)), new_job(model="other"))
    send(database, *ids[1:])
    Worker.registered(database).receive(Arrival(ids[1]))

    with database.begin() as connection:
        assert sweeps.count_unreceived(connection) == {MODEL: 2, "other": 1}


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
            pages.append(sweeps.expire_deadlines(connection, 3))

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
        first = sweeps.expire_leases(one, 3)
        second = sweeps.expire_leases(other, 3)
        unsent_first = sweeps.unsent(one, MODEL, range(10), 1, 0.0)
        unsent_second = sweeps.unsent(other, MODEL, range(10), 1, 0.0)

    assert (len(first), len(second)) == (3, 1)
    assert not {each.job_id for each in first} & {each.job_id for each in second}
    assert {each.id for each in unsent_first}.isdisjoint(each.id for each in unsent_second)


def test_a_stranger_in_running_is_lost_like_any_other(database: Database) -> None:
    """A worker's row may be gone, say after a restore from a backup."""
    ids = insert(database, new_job())
    Worker.registered(database).claim(ids)
    rewrite(database, f"worker_id = '{uuid4()}'", ids[0])

    assert [each.state for each in expire_leases(database)] == [JobState.QUEUED]
