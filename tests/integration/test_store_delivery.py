"""Where a job's message is, as its row knows it: unsent, sent, held."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

import app
from app.errors import GristmillError
from app.jobs import DEFAULT_TENANT, JobState, Kind
from app.store import cancellation, claims, delivery, submissions, sweeps
from app.store.claims import Claimed, Member
from app.store.database import Database
from app.store.delivery import Delivery, delivery_of
from app.store.submissions import Incoming
from tests.rows import (
    MODEL,
    Worker,
    column,
    end_lease,
    insert,
    insert_sent,
    new_job,
    rewrite,
    view,
)


def send_due(database: Database, priorities: object = range(10), page: int = 100) -> list[UUID]:
    with database.begin() as connection:
        sent = delivery.send_due(connection, MODEL, list(priorities), page)  # type: ignore[call-overload]
    return [wake_up.id for wake_up in sent]


def send_again(database: Database, *ids: UUID, lost_after_s: float = 10.0) -> list[UUID]:
    with database.begin() as connection:
        return [each.id for each in delivery.send_again(connection, ids, lost_after_s)]


def overdue(database: Database, lost_after_s: float = 10.0, most: int = 100) -> list[UUID]:
    with database.begin() as connection:
        return list(delivery.overdue(connection, lost_after_s, most))


def state_of(database: Database, job_id: UUID) -> Delivery:
    return delivery_of(
        column(database, job_id, "received_by"), column(database, job_id, "enqueued_at")
    )


# ── sending ─────────────────────────────────────────────────────────────────────────────────────


def test_a_new_job_is_written_as_sent_if_that_was_asked_and_it_is_due(database: Database) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    jobs = due, early, _ = new_job(), new_job(not_before=later), new_job()

    with database.begin() as connection:
        rows = submissions.insert_jobs(connection, jobs, sent=[due.id, early.id])

    assert [row.is_sent for row in rows] == [True, False, False]
    assert [state_of(database, job.id) for job in jobs] == ["sent", "unsent", "unsent"]


def test_a_job_that_was_there_before_is_not_sent_by_whoever_submits_it_again(
    database: Database,
) -> None:
    insert(database, new_job(idempotency_key="k"))
    again = new_job(idempotency_key="k")

    with database.begin() as connection:
        [row] = submissions.insert_jobs(connection, [again], sent=[again.id])

    assert (row.created, row.is_sent) == (False, False)


def test_unsent_jobs_are_marked_once_as_soon_as_they_are_due(database: Database) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    due, early = insert(database, new_job(), new_job(not_before=later))

    assert send_due(database) == [due]
    assert send_due(database) == []
    rewrite(database, "not_before = now()", early)
    assert send_due(database) == [early]


def test_urgent_jobs_are_sent_first_and_then_old_ones(database: Database) -> None:
    patient, young, old, _ = insert(
        database,
        new_job(priority=2),
        new_job(priority=1),
        new_job(priority=1),
        new_job(model="other"),
    )
    rewrite(database, "not_before = now() - interval '1 hour'", old)
    rewrite(database, "not_before = now() - interval '2 hours'", patient)

    with database.begin() as connection:
        assert delivery.unsent(connection) == sorted(
            [(MODEL, DEFAULT_TENANT), ("other", DEFAULT_TENANT)]
        )
    assert send_due(database, [0, 1, 2], page=2) == [old, young]
    assert send_due(database, [0, 1, 2], page=2) == [patient]


def test_what_could_not_be_sent_is_unsent_again_unless_somebody_has_it(database: Database) -> None:
    ids = insert_sent(database, new_job(), new_job())
    Worker.registered(database).receive(Incoming(ids[1]))

    with database.begin() as connection:
        delivery.not_sent(connection, ids)

    assert [state_of(database, job_id) for job_id in ids] == ["unsent", "held"]


def test_taking_back_a_mark_waits_for_nobody(database: Database) -> None:
    ids = insert_sent(database, new_job(), new_job())

    with database.begin() as receiving:
        receiving.execute(
            text("SELECT id FROM open_jobs WHERE id = :id FOR UPDATE"), {"id": ids[0]}
        )
        with database.begin() as connection:
            delivery.not_sent(connection, ids)

    assert [state_of(database, job_id) for job_id in ids] == ["sent", "unsent"]


def test_a_message_is_overdue_twice_as_late_each_time_it_is_sent(database: Database) -> None:
    [job_id] = insert_sent(database, new_job())
    limits_s = []
    for _ in range(3):
        age_s = 5
        while not overdue(database):
            age_s += 5
            rewrite(database, f"enqueued_at = now() - interval '{age_s} s'", job_id)
        limits_s.append(age_s)
        assert send_again(database, job_id) == [job_id]

    assert limits_s == [10, 20, 40]


def test_overdue_messages_are_found_by_model_oldest_first(database: Database) -> None:
    ids = insert_sent(database, *(new_job() for _ in range(4)), new_job(model="other"))
    for age, job_id in enumerate(ids):
        rewrite(database, f"enqueued_at = now() - interval '{100 + age} s'", job_id)

    assert set(overdue(database, most=2)) == {ids[3], ids[2], ids[4]}


def test_a_message_that_was_received_is_not_overdue(database: Database) -> None:
    [job_id] = insert_sent(database, new_job())
    rewrite(database, "enqueued_at = now() - interval '1 h'", job_id)
    assert overdue(database) == [job_id]

    Worker.registered(database).receive(Incoming(job_id))

    assert overdue(database) == []
    assert send_again(database, job_id) == []


def test_a_lost_message_is_sent_again_by_one_rescue_process(database: Database) -> None:
    [job_id] = insert_sent(database, new_job())
    rewrite(database, "enqueued_at = now() - interval '1 h'", job_id)

    assert [send_again(database, job_id), send_again(database, job_id)] == [[job_id], []]


@pytest.mark.parametrize("change", ["kind = 'imagine'", "format = 2"])
def test_jobs_that_only_a_later_version_knows_are_left_to_it(
    database: Database, change: str
) -> None:
    # given jobs of a later version, unsent and sent long ago
    never, known = insert(database, new_job(), new_job())
    [sent] = insert_sent(database, new_job())
    with database.begin() as connection:
        connection.execute(text("ALTER TABLE open_jobs DROP CONSTRAINT open_jobs_kind_check"))
    for job_id in (never, sent):
        rewrite(database, change, job_id)
    rewrite(database, "enqueued_at = now() - interval '1 day'", sent)

    # then neither rescue nor a worker of this version touches them
    assert send_due(database) == [known]
    assert overdue(database) == []
    received = Worker.registered(database).receive(Incoming(never), Incoming(sent))
    assert received == {}
    assert state_of(database, sent) == "sent"


# ── holding ─────────────────────────────────────────────────────────────────────────────────────


def test_jobs_let_go_of_are_nobodys_again(database: Database) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    due, early = new_job(), new_job(not_before=later)
    worker, other = Worker.registered(database), Worker.registered(database)
    worker.receive(Incoming(due.id, due), Incoming(early.id, early))

    with database.begin() as connection:
        delivery.let_go(connection, other.id, [due.id, early.id])
    assert state_of(database, due.id) == "held"

    with database.begin() as connection:
        delivery.let_go(connection, worker.id, [due.id, early.id])
    assert state_of(database, due.id) == "sent"  # its message goes back
    assert state_of(database, early.id) == "unsent"  # rescue sends it when it is due


def test_what_a_dead_worker_held_is_unsent(database: Database) -> None:
    ids = insert_sent(database, new_job(), new_job())
    dead, alive = Worker.registered(database), Worker.registered(database)
    dead.receive(Incoming(ids[0]))
    alive.receive(Incoming(ids[1]))
    end_lease(database, dead.id)

    with database.begin() as connection:
        assert delivery.free_lost(connection, 100) == 1

    assert [state_of(database, job_id) for job_id in ids] == ["unsent", "held"]


def test_what_a_living_worker_holds_and_has_forgotten_is_unsent(database: Database) -> None:
    # given a worker that knows one of the two jobs that it holds, and another with its own
    ids = insert_sent(database, new_job(), new_job(), new_job())
    worker, other = Worker.registered(database), Worker.registered(database)
    worker.receive(*map(Incoming, ids[:2]))
    other.receive(Incoming(ids[2]))

    with database.begin() as connection:
        assert delivery.free_forgotten(connection, worker.id, ids[:1]) == ids[1:2]

    assert [state_of(database, job_id) for job_id in ids] == ["held", "unsent", "held"]


def test_a_job_that_leaves_the_queue_is_held_by_nobody(database: Database) -> None:
    ids = insert_sent(database, new_job(), new_job())
    worker = Worker.registered(database)
    worker.receive(*map(Incoming, ids))

    worker.claim(ids[:1])
    with database.begin() as connection:
        cancellation.cancel(connection, ids[1])

    assert [column(database, job_id, "received_by") for job_id in ids] == [None, None]


@pytest.mark.parametrize(
    "change",
    [
        "worker_id = gen_random_uuid()",  # held without ever having been sent
        "attempt_id = gen_random_uuid()",
        "state = 'running'",
        "state = 'failed'",
        "wake_count = -1",
    ],
)
def test_the_schema_refuses_what_cannot_be(database: Database, change: str) -> None:
    [job_id] = insert(database, new_job())

    with pytest.raises(GristmillError, match=r"open_jobs_(holder|state|counts)_check"):
        rewrite(database, change, job_id)


# ── messages that nobody had read ───────────────────────────────────────────────────────────────


def test_a_revoked_message_that_nobody_had_read_is_a_cancelled_job(database: Database) -> None:
    job = new_job(source="message")

    with database.begin() as connection:
        state = cancellation.cancel_or_record(connection, job.id, Kind.GENERATE)

    assert state is JobState.CANCELLED
    assert view(database, job.id).state is JobState.CANCELLED
    received = Worker.registered(database).receive(Incoming(job.id, job))  # it still comes
    assert received[job.id].state is JobState.CANCELLED


def test_a_revoked_message_of_a_job_that_is_there_cancels_it(database: Database) -> None:
    [job_id] = insert_sent(database, new_job())

    with database.begin() as connection:
        cancellation.cancel_or_record(connection, job_id, Kind.GENERATE)
        cancellation.cancel_or_record(connection, job_id, Kind.GENERATE)

    assert view(database, job_id).state is JobState.CANCELLED


def test_nobody_but_the_delivery_writes_where_messages_are() -> None:
    columns = r"\b(enqueued_at|wake_count)\s*=(?!=)"
    package = Path(app.__file__).parent

    writers = {file.name for file in package.rglob("*.py") if re.search(columns, file.read_text())}

    assert writers == {"delivery.py"}


@pytest.mark.parametrize("times", [1, 3])
def test_a_claim_is_repeated_after_any_outage_without_an_error(
    database: Database, times: int
) -> None:
    # given a claim whose answer was lost, and the attempt with it
    [job_id] = insert_sent(database, new_job())
    worker, other = Worker.registered(database), Worker.registered(database)
    batch, members = worker.batch(), [Member(job_id, uuid4())]

    def claim() -> list[Claimed]:
        with database.begin() as connection:
            return claims.claim(connection, batch, members)

    assert claim() == claim()
    end_lease(database, worker.id)
    with database.begin() as connection:
        sweeps.expire_leases(connection, sweeps.find_lost(connection, 10))
    worker.heartbeat()

    # then it is answered, as often as it is asked, and the job is another's to claim
    assert [claim() for _ in range(times)] == [[]] * times
    assert other.complete(other.claim([job_id]))
    assert claim() == []
