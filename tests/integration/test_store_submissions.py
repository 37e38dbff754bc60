"""How rows come in: inserts, arrivals of messages, and refusals."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID, uuid4

from sqlalchemy import event, text

from app.jobs import JobState, Kind
from app.store import counts, purging, submissions
from app.store.database import Database
from app.store.submissions import Incoming, Inserted, NewJob, RejectedJob
from tests.rows import MODEL, Worker, at_once, column, insert, new_job, view


def inserted(database: Database, *jobs: NewJob) -> list[Inserted]:
    with database.begin() as connection:
        return submissions.insert_jobs(connection, jobs)


def reject(database: Database, job_id: UUID) -> set[UUID]:
    rejected = RejectedJob(
        id=job_id, kind=Kind.EMBED, error_code="invalid_request", error_message="Not JSON."
    )
    with database.begin() as connection:
        return submissions.reject(connection, [rejected])


def test_ten_thousand_jobs_go_in_at_once_and_are_answered_in_order(database: Database) -> None:
    jobs = [new_job() for _ in range(10_000)]

    assert inserted(database, *jobs) == [Inserted(job.id, True, True) for job in jobs]


def test_a_job_is_written_as_it_was_asked(database: Database) -> None:
    deadline = datetime(2100, 1, 1, tzinfo=UTC)
    job = new_job(
        priority=3, deadline=deadline, metadata={"order": "7"}, input_tokens=4, max_attempts=5
    )
    insert(database, job)

    stored = view(database, job.id)

    assert (stored.priority, stored.deadline, stored.metadata) == (3, deadline, {"order": "7"})
    assert (stored.state, stored.max_attempts) == (JobState.QUEUED, 5)
    assert stored.created_at == stored.queued_at == stored.not_before
    assert stored.created_at.utcoffset() == timedelta(0)
    assert column(database, job.id, "request") == {"prompt": "A mill"}
    assert column(database, job.id, "enqueued_at") is None


def test_a_job_whose_key_is_purged_away_meanwhile_is_written(database: Database) -> None:
    """Between the statement that finds the key taken and the one that looks for its job."""
    [first] = inserted(database, new_job(idempotency_key="k"))
    job = new_job(idempotency_key="k")
    with database.begin() as connection:

        def purge_first(_: object, __: object, statement: str, *___: object) -> None:
            if "JOIN LATERAL" in statement:
                with database.begin() as other:
                    purging.purge(other, first.id)

        event.listen(connection, "before_cursor_execute", purge_first)

        assert submissions.insert_jobs(connection, [job]) == [Inserted(job.id, True, True)]


def test_the_same_key_and_request_are_the_same_job(database: Database) -> None:
    [first] = inserted(database, new_job(idempotency_key="k"))

    [again] = inserted(database, new_job(idempotency_key="k"))

    assert again == Inserted(first.id, False, True)


def test_the_same_key_with_another_request_is_told_apart(database: Database) -> None:
    [first] = inserted(database, new_job(idempotency_key="k"))

    [other] = inserted(database, new_job(idempotency_key="k", fingerprint="beef"))

    assert other == Inserted(first.id, False, False)


def test_the_first_of_equal_keys_in_one_bulk_wins(database: Database) -> None:
    for _ in range(5):
        key = str(uuid4())
        jobs = [new_job(idempotency_key=key), new_job(), new_job(idempotency_key=key)]

        answers = inserted(database, *jobs)

        assert answers[0] == Inserted(jobs[0].id, True, True)
        assert answers[2] == Inserted(jobs[0].id, False, True)


def test_a_key_belongs_to_its_tenant(database: Database) -> None:
    answers = [
        inserted(database, new_job(idempotency_key="k", tenant=tenant))[0].created
        for tenant in ("mill", "bakery")
    ]

    assert answers == [True, True]


def test_one_key_sent_by_many_at_once_makes_one_job(database: Database) -> None:
    for _ in range(10):
        key = str(uuid4())

        answers = at_once(
            *[lambda key=key: inserted(database, new_job(idempotency_key=key))[0]] * 6
        )

        assert len({answer.id for answer in answers}) == 1
        assert sum(answer.created for answer in answers) == 1


def test_keys_in_opposite_order_never_deadlock(database: Database) -> None:
    for _ in range(5):
        keys = [str(uuid4()) for _ in range(50)]

        def bulk(keys: list[str]) -> list[Inserted]:
            return inserted(database, *(new_job(idempotency_key=key) for key in keys))

        one, other = at_once(partial(bulk, keys), partial(bulk, keys[::-1]))

        assert {row.id for row in one} == {row.id for row in other}


def test_characters_that_postgres_cannot_keep_are_replaced_and_fail_nobody(
    database: Database,
) -> None:
    strange = new_job(request={"prompt": "a\0b", "stop": "\\u0000 \ud800 \u00e9"})
    insert(database, strange, new_job())

    assert column(database, strange.id, "request") == {
        "prompt": "a\ufffdb",
        "stop": "\\u0000 ? \u00e9",
    }


def test_an_arrival_says_how_far_off_its_deadline_is_by_the_database_s_clock(
    database: Database,
) -> None:
    job = new_job(source="message", deadline=datetime.now(UTC) + timedelta(hours=1))

    received = Worker.registered(database).receive(Incoming(job.id, job))[job.id]

    assert received.expires_in_s is not None
    assert 3_000 < received.expires_in_s <= 3_600


def test_an_arrival_with_a_request_becomes_a_row(database: Database) -> None:
    worker = Worker.registered(database)
    job = new_job(source="message")

    received = worker.receive(Incoming(job.id, job))[job.id]

    assert (received.state, received.is_due, received.model) == (JobState.QUEUED, True, MODEL)
    assert received.request is None  # the message has it
    assert received.expires_in_s is None
    assert column(database, job.id, "received_by") == worker.id
    assert column(database, job.id, "enqueued_at") is not None


def test_an_arrival_without_a_request_gets_it_from_the_row(database: Database) -> None:
    [job_id] = insert(database, new_job())
    worker = Worker.registered(database)

    received = worker.receive(Incoming(job_id))[job_id]

    assert (received.url, received.request) == ("/v1/completions", {"prompt": "A mill"})
    assert column(database, job_id, "received_by") == worker.id


def test_the_row_wins_over_a_message_with_another_request(database: Database) -> None:
    job = new_job()
    insert(database, job)
    forged = new_job(id=job.id, request={"prompt": "Another"}, fingerprint="beef", source="message")

    received = Worker.registered(database).receive(Incoming(job.id, forged))[job.id]

    assert received.request == {"prompt": "A mill"}


def test_an_arrival_without_row_and_request_is_missing_from_the_answer(
    database: Database,
) -> None:
    [job_id] = insert(database, new_job())

    received = Worker.registered(database).receive(Incoming(uuid4()), Incoming(job_id))

    assert set(received) == {job_id}


def test_a_message_that_comes_twice_in_a_group_is_one_job(database: Database) -> None:
    job = new_job(source="message")

    received = Worker.registered(database).receive(
        Incoming(job.id, job), Incoming(job.id), Incoming(job.id, job)
    )

    assert set(received) == {job.id}


def test_a_late_copy_of_a_message_learns_how_its_job_ended(database: Database) -> None:
    job = new_job(source="message")
    worker = Worker.registered(database)
    worker.receive(Incoming(job.id, job))
    worker.complete(worker.claim([job.id]))

    received = Worker.registered(database).receive(Incoming(job.id, job))

    assert received[job.id].state is JobState.COMPLETED
    assert column(database, job.id, "received_by") is None


def test_one_message_received_by_many_at_once_is_one_row_and_all_hear_of_it(
    database: Database,
) -> None:
    workers = [Worker.registered(database) for _ in range(4)]
    for _ in range(10):
        jobs = [new_job(source="message") for _ in range(8)]
        arrivals = [Incoming(job.id, job) for job in jobs]

        answers = at_once(
            *(
                partial(worker.receive, *(arrivals if n % 2 else arrivals[::-1]))
                for n, worker in enumerate(workers)
            )
        )

        for answer in answers:
            assert set(answer) == {job.id for job in jobs}


def test_a_job_that_is_not_due_says_so(database: Database) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    job = new_job(source="message", not_before=later)

    received = Worker.registered(database).receive(Incoming(job.id, job))[job.id]

    assert (received.is_due, received.not_before) == (False, later)


def test_a_message_that_cannot_run_is_a_failed_job_with_the_reason(database: Database) -> None:
    job_id = uuid4()

    assert reject(database, job_id) == {job_id}

    job = view(database, job_id)
    assert job.state is JobState.FAILED
    assert job.result is not None
    assert (job.result.error_code, job.result.error_message) == ("invalid_request", "Not JSON.")
    assert reject(database, job_id) == set()


def test_a_bad_message_cannot_fail_a_job_that_exists(database: Database) -> None:
    [job_id] = insert(database, new_job())

    assert reject(database, job_id) == set()
    assert view(database, job_id).state is JobState.QUEUED


def test_the_queue_is_what_nobody_has_received(database: Database) -> None:
    ids = insert(database, *(new_job() for _ in range(5)))
    worker = Worker.registered(database)
    worker.receive(Incoming(ids[0]))
    worker.claim([ids[1]])

    with database.begin() as connection:
        assert counts.queued(connection).jobs == 3


def test_a_forged_message_for_a_job_of_a_later_version_leaves_it_alone(database: Database) -> None:
    [later, ours] = insert(database, new_job(), new_job())
    with database.begin() as connection:
        connection.execute(
            text("ALTER TABLE open_jobs DROP CONSTRAINT IF EXISTS open_jobs_kind_check")
        )
        connection.execute(
            text("UPDATE open_jobs SET kind = 'imagine' WHERE id = :id"), {"id": later}
        )
    worker = Worker.registered(database)

    with database.begin() as connection:
        received = submissions.receive(connection, worker.id, [Incoming(later), Incoming(ours)])
        again = submissions.receive(connection, worker.id, [Incoming(later, new_job(id=later))])

    assert set(received) == {ours} and not again
    assert column(database, later, "received_by") is None
