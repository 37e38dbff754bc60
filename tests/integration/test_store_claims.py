"""Claim, finish, release on a real Postgres, also when several want the same job."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from itertools import chain
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, event, text

from app.books.energy import EnergyMethod
from app.errors import GristmillError, JobStateConflict, Unavailable
from app.jobs import AttemptOutcome, JobState
from app.store import cancellation, claims, releases, sweeps, workers
from app.store.claims import BatchStats, Member, NewBatch
from app.store.database import Database
from app.store.reads import JobView
from app.store.releases import Release
from tests.rows import (
    Worker,
    at_once,
    completed,
    end_lease,
    insert,
    new_job,
    rewrite,
    view,
)


def count(database: Database, table: str) -> int:
    with database.begin() as connection:
        return connection.scalar(text(f"SELECT count(*) FROM {table}")) or 0


def test_each_job_is_claimed_once_however_many_workers_want_it(database: Database) -> None:
    ids = insert(database, *(new_job() for _ in range(40)))
    workers = [Worker.registered(database) for _ in range(6)]

    def claim_all(worker: Worker, seed: int) -> list[UUID]:
        mixed = random.Random(seed).sample(ids, len(ids))
        return [
            each.job_id for start in range(0, 40, 8) for each in worker.claim(mixed[start:][:8])
        ]

    claimed = at_once(*(partial(claim_all, worker, n) for n, worker in enumerate(workers)))

    assert sorted(chain.from_iterable(claimed)) == sorted(ids)
    assert count(database, "attempts") == 40


def test_a_claim_opens_an_attempt_and_a_batch(database: Database) -> None:
    ids = insert(database, new_job(), new_job())
    worker = Worker.registered(database)
    batch = worker.batch()

    with database.begin() as connection:
        claimed = claims.claim(connection, batch, [Member(id, uuid4(), 3) for id in ids])

    job = view(database, ids[0])
    assert job.state is JobState.RUNNING
    assert [(each.number, each.outcome) for each in job.attempts] == [(1, None)]
    assert {each.job_id for each in claimed} == set(ids)
    assert job.batch is not None
    assert (job.batch.id, job.batch.num_jobs, job.batch.num_sequences) == (batch.id, 2, 6)
    assert job.batch.claimed_at - job.batch.opened_at == timedelta(milliseconds=5)


def test_a_batch_counts_only_the_members_that_it_got(database: Database) -> None:
    [free, taken] = insert(database, new_job(), new_job())
    Worker.registered(database).claim([taken])

    claimed = Worker.registered(database).claim([free, taken, uuid4()])

    assert [each.job_id for each in claimed] == [free]
    job = view(database, free)
    assert job.batch is not None
    assert (job.batch.num_jobs, job.batch.num_sequences) == (1, 1)


def test_a_claim_that_gets_nothing_leaves_no_batch(database: Database) -> None:
    worker = Worker.registered(database)

    assert worker.claim([uuid4()]) == []
    assert count(database, "batches") == 0


def test_jobs_that_are_early_late_or_cancelled_are_not_claimed(database: Database) -> None:
    now = datetime.now(UTC)
    [early, late, cancelled] = insert(
        database,
        new_job(not_before=now + timedelta(hours=1)),
        new_job(deadline=now - timedelta(seconds=1)),
        new_job(),
    )
    with database.begin() as connection:
        cancellation.cancel(connection, cancelled)

    assert Worker.registered(database).claim([early, late, cancelled]) == []


def test_a_repeated_claim_is_the_same_claim(database: Database) -> None:
    ids = insert(database, new_job(), new_job())
    worker = Worker.registered(database)
    batch, members = worker.batch(), [Member(id, uuid4()) for id in ids]

    with database.begin() as connection:
        first = claims.claim(connection, batch, members)
    with database.begin() as connection:
        second = claims.claim(connection, batch, members)

    assert sorted(map(repr, first)) == sorted(map(repr, second))
    assert count(database, "attempts") == 2
    assert count(database, "batches") == 1


@pytest.mark.parametrize("move", [claims.claim, claims.take])
def test_what_is_repeated_after_its_attempt_was_lost_gets_nothing(
    database: Database, move: Callable[[Connection, NewBatch, list[Member]], list[object]]
) -> None:
    # given a claim or take whose answer was lost, and an outage longer than the lease
    [job_id] = insert(database, new_job())
    worker = Worker.registered(database)
    batch, members = worker.batch(), [Member(job_id, uuid4())]
    with database.begin() as connection:
        assert move(connection, batch, members)
    end_lease(database, worker.id)
    with database.begin() as connection:
        sweeps.expire_leases(connection, sweeps.find_lost(connection, 10))
    with database.begin() as connection:
        workers.heartbeat(connection, worker.id, 30)

    # when it is tried again
    with database.begin() as connection:
        again = move(connection, batch, members)

    assert again == []
    assert view(database, job_id).state is JobState.QUEUED


def test_a_repeated_claim_may_get_more_than_the_first(database: Database) -> None:
    [free, taken] = insert(database, new_job(), new_job())
    other, worker = Worker.registered(database), Worker.registered(database)
    [theirs] = other.claim([taken])
    batch, members = worker.batch(), [Member(id, uuid4()) for id in (free, taken)]
    with database.begin() as connection:
        claims.claim(connection, batch, members)
    other.release(theirs)

    with database.begin() as connection:
        claimed = claims.claim(connection, batch, members)

    assert {each.job_id for each in claimed} == {free, taken}
    job = view(database, free)
    assert job.batch is not None
    assert (job.batch.num_jobs, job.batch.num_sequences) == (2, 2)


def test_a_worker_whose_lease_is_over_claims_nothing_until_its_next_heartbeat(
    database: Database,
) -> None:
    ids = insert(database, new_job())
    worker = Worker.registered(database)
    end_lease(database, worker.id)

    with pytest.raises(Unavailable, match="lease"):
        worker.claim(ids)
    assert view(database, ids[0]).state is JobState.QUEUED

    worker.heartbeat()
    assert len(worker.claim(ids)) == 1


def test_a_lease_that_is_renewed_while_a_claim_is_refused_does_not_make_the_jobs_others(
    database: Database,
) -> None:
    ids = insert(database, new_job())
    worker = Worker.registered(database)
    end_lease(database, worker.id)

    with database.begin() as connection:
        event.listen(connection, "after_cursor_execute", lambda *_: worker.heartbeat(), once=True)
        with pytest.raises(Unavailable, match="lease"):
            claims.claim(connection, worker.batch(), [Member(ids[0], uuid4())])

    assert len(worker.claim(ids)) == 1


def test_a_finished_job_has_every_stamp_and_every_figure(database: Database) -> None:
    [job_id] = insert(database, new_job())
    worker = Worker.registered(database)
    [claimed] = worker.claim([job_id])
    started = claimed.claimed_at + timedelta(milliseconds=1)

    with database.begin() as connection:
        settled = claims.finish(
            connection,
            [
                completed(
                    claimed,
                    response={"text": "Flour."},
                    input_tokens=7,
                    output_tokens=2,
                    started_at=started,
                    first_token_at=started,
                    batch_wait_ms=0.5,
                    inference_ms=1.5,
                    batch_size=1,
                    device_ns=1_500_000,
                    cost=Decimal("0.000000015"),
                    currency="EUR",
                    price_id="cpu",
                    price=Decimal("0.036"),
                    prefill_ns=1_000_000,
                    recomputed_ns=0,
                    preemptions=0,
                    preempted_ms=0.0,
                    energy_nj=450_000_000,
                    wasted_nj=0,
                    energy_method=EnergyMethod.MEASURED,
                    energy_boundary="gpu",
                    carbon_ug=47,
                )
            ],
            [BatchStats(view_batch(view(database, job_id)), 9, 12, 1_500_000)],
        )

    job = view(database, job_id)
    result, [attempt] = job.result, job.attempts
    assert settled == [
        claims.Settled(claimed.attempt_id, 1_500_000, 0, 450_000_000, 0, counts=True)
    ]
    assert job.state is JobState.COMPLETED
    assert result is not None
    assert result.response == {"text": "Flour."}
    empty = {name for name in result.__slots__ if getattr(result, name) is None}
    assert empty == {"error_code", "error_message", "upstream_cost", "charge"}
    assert result.queue_ms == (started - job.created_at) / timedelta(milliseconds=1)
    assert result.ttft_ms == (started - job.created_at) / timedelta(milliseconds=1)
    assert result.total_ms == (result.finished_at - job.created_at) / timedelta(milliseconds=1)
    assert result.cost == Decimal("0.000000015")
    assert (attempt.outcome, attempt.charged, attempt.device_ns) == ("succeeded", True, 1_500_000)
    assert attempt.cost == result.cost
    assert (attempt.energy_nj, attempt.energy_method) == (result.energy_nj, "measured")
    assert job.batch is not None
    assert (job.batch.useful_tokens, job.batch.padded_tokens) == (9, 12)


def view_batch(job: JobView) -> UUID:
    assert job.batch is not None
    return job.batch.id


def test_a_repeated_finish_counts_and_changes_nothing(database: Database) -> None:
    [job_id] = insert(database, new_job())
    worker = Worker.registered(database)
    claimed = worker.claim([job_id])
    first = worker.complete(claimed)
    before = view(database, job_id)

    second = worker.complete(claimed)

    assert first == second == {claimed[0].attempt_id}
    assert view(database, job_id) == before


def test_a_zombie_that_finishes_after_its_rescue_changes_nothing(database: Database) -> None:
    [job_id] = insert(database, new_job())
    zombie = Worker.registered(database)
    [stale] = zombie.claim([job_id])
    end_lease(database, zombie.id)
    with database.begin() as connection:
        sweeps.expire_leases(connection, sweeps.find_lost(connection, 10))
    second = Worker.registered(database)
    claimed = second.claim([job_id])

    spent: dict[str, Any] = {"device_ns": 77, "energy_nj": 700, "wasted_nj": 7}
    spent["energy_method"] = EnergyMethod.ESTIMATED
    counted = zombie.finish(completed(stale, response={"text": "late"}, **spent))

    assert counted == set()
    assert view(database, job_id).state is JobState.RUNNING
    second.complete(claimed)
    assert zombie.finish(completed(stale, response={"text": "later"}, **spent)) == set()
    job = view(database, job_id)
    assert job.result is not None
    assert job.result.response == {"choices": []}
    # Its device time is in the books all the same, once, as waste that nobody pays.
    assert [(each.outcome, each.device_ns, each.wasted_ns) for each in job.attempts] == [
        ("lost", 0, 77),
        ("succeeded", 1_000, 0),
    ]
    assert [(each.energy_method, each.energy_nj, each.wasted_nj) for each in job.attempts] == [
        ("estimated", 0, 707),
        ("absent", None, None),
    ]
    assert job.attempts[0].cost == 0


def test_an_end_that_rescue_wrote_for_an_attempt_is_not_the_attempts_own(
    database: Database,
) -> None:
    # given a job that expired with its worker: the result names the attempt that was lost
    [job_id] = insert(database, new_job())
    zombie = Worker.registered(database)
    [stale] = zombie.claim([job_id])
    rewrite(database, "deadline = now()", job_id)
    end_lease(database, zombie.id)
    with database.begin() as connection:
        sweeps.expire_leases(connection, sweeps.find_lost(connection, 10))

    # when the worker comes to commit what it has
    counted = zombie.finish(completed(stale))

    # then it hears that this does not count, and tells nobody that the job completed
    assert counted == set()
    assert view(database, job_id).state is JobState.EXPIRED


def test_cancel_and_finish_at_the_same_moment_leave_one_result(database: Database) -> None:
    worker = Worker.registered(database)
    for job_id in insert(database, *(new_job() for _ in range(20))):
        claimed = worker.claim([job_id])

        def cancel(job_id: UUID = job_id) -> JobState | None:
            try:
                with database.begin() as connection:
                    return cancellation.cancel(connection, job_id)
            except JobStateConflict:
                return None

        answer, counted = at_once(cancel, partial(worker.complete, claimed))

        assert answer in (JobState.RUNNING, None)
        assert counted == {claimed[0].attempt_id}
        assert view(database, job_id).state is JobState.COMPLETED
    assert count(database, "results") == 20


def test_cancel_and_claim_at_the_same_moment_never_lose_the_cancel(database: Database) -> None:
    worker = Worker.registered(database)
    for job_id in insert(database, *(new_job() for _ in range(20))):

        def cancel(job_id: UUID = job_id) -> JobState:
            with database.begin() as connection:
                return cancellation.cancel(connection, job_id)

        answer, claimed = at_once(cancel, partial(worker.claim, [job_id]))

        if claimed:
            assert answer is JobState.RUNNING
            assert worker.heartbeat().cancel_requested == {claimed[0].attempt_id}
            worker.finish(completed(claimed[0], state=JobState.CANCELLED))
        else:
            assert answer is JobState.CANCELLED
        assert view(database, job_id).state is JobState.CANCELLED


def test_groups_in_opposite_order_never_deadlock(database: Database) -> None:
    for _ in range(10):
        ids = insert(database, *(new_job() for _ in range(30)))
        one, other = Worker.registered(database), Worker.registered(database)

        claimed = at_once(partial(one.claim, ids), partial(other.claim, ids[::-1]))

        assert sum(map(len, claimed)) == 30


def test_a_released_job_is_queued_again_and_not_charged(database: Database) -> None:
    [job_id] = insert(database, new_job(max_attempts=1))
    worker = Worker.registered(database)
    [claimed] = worker.claim([job_id])

    energy: dict[str, Any] = {"wasted_nj": 50, "energy_method": EnergyMethod.MEASURED}
    assert worker.release(claimed, wasted_ns=5, **energy) is JobState.QUEUED

    job = view(database, job_id)
    assert (job.attempt, job.attempts_charged) == (1, 0)
    [attempt] = job.attempts
    assert (attempt.outcome, attempt.charged) == ("released", False)
    assert (attempt.device_ns, attempt.cost, attempt.wasted_ns) == (0, 0, 5)
    assert (attempt.energy_nj, attempt.wasted_nj, attempt.energy_method) == (0, 50, "measured")
    assert [each.number for each in worker.claim([job_id])] == [2]


def test_a_job_fails_with_its_last_charged_attempt(database: Database) -> None:
    [job_id] = insert(database, new_job(max_attempts=2))
    worker = Worker.registered(database)
    states = []

    for _ in range(2):
        [claimed] = worker.claim([job_id])
        states.append(
            worker.release(
                claimed,
                outcome=AttemptOutcome.LOST,
                charged=True,
                error_code="engine_crash",
                error_message="The engine process died.",
            )
        )

    job = view(database, job_id)
    assert states == [JobState.QUEUED, JobState.FAILED]
    assert job.result is not None
    assert (job.result.error_code, job.result.attempt_id) == ("engine_crash", claimed.attempt_id)
    assert [each.outcome for each in job.attempts] == ["lost", "lost"]


def test_a_release_of_a_cancelled_or_late_job_ends_it(database: Database) -> None:
    ids = insert(database, new_job(), new_job())
    worker = Worker.registered(database)
    grants = {each.job_id: each for each in worker.claim(ids)}
    cancelled, late = ids
    with database.begin() as connection:
        cancellation.cancel(connection, cancelled)
    rewrite(database, "deadline = now()", late)

    assert worker.release(grants[cancelled]) is JobState.CANCELLED
    assert worker.release(grants[late]) is JobState.EXPIRED
    assert count(database, "results") == 2


def test_a_release_after_the_lease_was_lost_notes_what_was_wasted_and_no_more(
    database: Database,
) -> None:
    # given an attempt that was taken from a worker that was only slow
    [job_id] = insert(database, new_job())
    slow = Worker.registered(database)
    [claimed] = slow.claim([job_id])
    end_lease(database, slow.id)
    with database.begin() as connection:
        sweeps.expire_leases(connection, sweeps.find_lost(connection, 10))

    # when it gives it back, and again because it did not hear the answer
    assert [slow.release(claimed, wasted_ns=7) for _ in range(2)] == [None, None]

    job = view(database, job_id)
    assert (job.state, job.attempts_charged) == (JobState.QUEUED, 0)
    assert [(each.outcome, each.device_ns, each.wasted_ns) for each in job.attempts] == [
        ("lost", 0, 7)
    ]


def test_a_batch_counts_what_it_took_when_its_members_are_given_back(database: Database) -> None:
    [job_id] = insert(database, new_job())
    worker = Worker.registered(database)
    [claimed] = worker.claim([job_id])
    batch_id = view_batch(view(database, job_id))
    release = Release(
        job_id=job_id,
        attempt_id=claimed.attempt_id,
        created_at=claimed.created_at,
        outcome=AttemptOutcome.RELEASED,
        charged=False,
        wasted_ns=5,
    )

    with database.begin() as connection:
        releases.release(connection, [release], [BatchStats(batch_id, 3, 4, 5)])

    with database.begin() as connection:
        found = connection.execute(
            text("SELECT useful_tokens, padded_tokens, device_ns FROM batches WHERE id = :id"),
            {"id": batch_id},
        ).one()
    assert tuple(found) == (3, 4, 5)


def test_a_repeated_release_changes_nothing(database: Database) -> None:
    [job_id] = insert(database, new_job())
    worker = Worker.registered(database)
    [claimed] = worker.claim([job_id])
    worker.release(claimed)

    assert worker.release(claimed, charged=True) is None
    assert view(database, job_id).attempts_charged == 0


def test_a_record_that_cannot_be_stored_is_refused_before_it_reaches_the_others(
    database: Database,
) -> None:
    [job_id] = insert(database, new_job())
    worker = Worker.registered(database)
    [claimed] = worker.claim([job_id])

    with pytest.raises(GristmillError, match="cannot be stored"):
        worker.finish(completed(claimed, response={"logprob": float("nan")}))
    assert view(database, job_id).state is JobState.RUNNING


def test_cancelling_a_queued_job_ends_it_at_once_and_again_is_the_same(database: Database) -> None:
    [job_id] = insert(database, new_job())

    for _ in range(2):
        with database.begin() as connection:
            assert cancellation.cancel(connection, job_id) is JobState.CANCELLED

    job = view(database, job_id)
    assert job.result is not None
    assert (job.result.state, job.result.attempt_id) == (JobState.CANCELLED, None)


def test_cancelling_a_finished_job_is_a_conflict(database: Database) -> None:
    [job_id] = insert(database, new_job())
    worker = Worker.registered(database)
    worker.complete(worker.claim([job_id]))

    with pytest.raises(JobStateConflict, match="completed"), database.begin() as connection:
        cancellation.cancel(connection, job_id)
