"""Where a job's time went, from its rows: as long as it is open, and however it ended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import text

from app.api.jobs.schemas_timeline import Timeline
from app.api.jobs.timeline_views import timeline_of
from app.books.energy import EnergyMethod
from app.books.timeline import Phase
from app.config.settings import Settings
from app.jobs import AttemptOutcome, JobState, Kind
from app.store import cancellation, delivery, purging, reads, submissions, surroundings, sweeps
from app.store.claims import Claimed
from app.store.database import Database
from app.store.reads import JobView
from app.store.submissions import Incoming, RejectedJob
from tests.apis import running_api
from tests.rows import Worker, completed, end_lease, insert, insert_sent, new_job, rewrite, view


def explain(database: Database, job_id: UUID) -> Timeline:
    """What the API tells, checked: its parts add up to the whole."""
    with database.autocommit() as connection:
        [job] = reads.summaries(connection, [job_id])
        assert isinstance(job, JobView)
        told = timeline_of(job, surroundings.of_job(connection, job))
    assert sum(Decimal(str(span.ms)) for span in told.spans) == Decimal(str(told.total_ms))
    if job.result is not None:
        assert told.total_ms == pytest.approx(job.result.total_ms, abs=1e-6)
    attempts = sum(each.billed_ns + each.wasted_ns for each in told.attempts)
    assert sum(part.ns for part in told.device.parts) == told.device.total_ns == attempts
    if told.cost and told.cost.amount is not None:
        costs = sum((part.cost or Decimal(0) for part in told.device.parts), Decimal(0))
        assert costs == told.cost.amount - (told.cost.upstream or 0)
    return told


def phases(told: Timeline) -> list[Phase]:
    return [span.phase for span in told.spans]


def receive(worker: Worker, job_id: UUID) -> None:
    worker.receive(Incoming(job_id))


def an_answer(claimed: Claimed) -> dict[str, object]:
    return {
        "started_at": claimed.claimed_at + timedelta(microseconds=1),
        "first_token_at": claimed.claimed_at + timedelta(microseconds=2),
        "inference_ms": 0.002,
        "device_ns": 1_000,
        "prefill_ns": 300,
        "recomputed_ns": 100,
        "preemptions": 2,
        "preempted_ms": 0.001,
        "cost": Decimal("0.000001005"),
        "upstream_cost": Decimal("0.000000005"),
        "price": Decimal(3_600),  # a nano-unit for each nanosecond
        "price_id": "gold",
        "currency": "EUR",
        "energy_nj": 1_000,
        "wasted_nj": 0,
        "energy_method": EnergyMethod.MEASURED,
        "energy_boundary": "gpu",
    }


def test_an_open_job_says_what_it_waits_for_and_for_how_long(database: Database) -> None:
    [unsent] = insert(database, new_job())
    [sent] = insert_sent(database, new_job())
    assert explain(database, sent).awaits == "no_worker"

    worker = Worker.registered(database)
    assert explain(database, unsent).awaits == "sending"
    assert explain(database, sent).awaits == "worker"
    rewrite(database, "not_before = now() + interval '1 hour', deadline = '2100-01-01Z'", unsent)
    assert explain(database, unsent).notes == [
        "It expires if it has not ended by 2100-01-01 00:00:00 UTC."
    ]
    assert (explain(database, unsent).awaits, phases(explain(database, unsent))) == (
        "time",
        [Phase.SCHEDULED],
    )

    receive(worker, sent)
    held = explain(database, sent)
    assert (held.awaits, phases(held)[-1]) == ("batch", Phase.HELD)
    assert held.worker and held.worker.name == "worker@mill"

    worker.claim([sent])
    running = explain(database, sent)
    assert (running.awaits, phases(running)[-1]) == ("engine", Phase.RUNNING)
    with database.begin() as connection:
        cancellation.cancel(connection, sent)
    assert explain(database, sent).awaits == "stop"
    end_lease(database, worker.id)
    assert explain(database, sent).awaits == "rescue"


def test_a_message_that_a_worker_let_go_of_is_nobodys(database: Database) -> None:
    worker = Worker.registered(database)
    [job_id] = insert_sent(database, new_job())
    receive(worker, job_id)

    with database.begin() as connection:
        delivery.let_go(connection, worker.id, [job_id])

    assert phases(explain(database, job_id))[-1] == Phase.SENT


def test_an_answered_job_tells_of_every_phase_and_of_every_nanosecond(database: Database) -> None:
    worker = Worker.registered(database)
    [job_id] = insert_sent(database, new_job())
    receive(worker, job_id)
    [claimed] = worker.claim([job_id])

    worker.finish(completed(claimed, **an_answer(claimed)))

    told = explain(database, job_id)
    assert phases(told) == [
        Phase.SENT, Phase.HELD, Phase.CLAIMED, Phase.PREFILL, Phase.DECODE, Phase.COMMIT,
    ]  # fmt: skip
    assert [(part.use, part.ns, part.cost, part.energy_j) for part in told.device.parts] == [
        ("prefill", 300, Decimal("3e-7"), 3e-7),
        ("decode", 600, Decimal("6e-7"), 6e-7),
        ("recomputed", 100, Decimal("1e-7"), 1e-7),
    ]
    assert (told.preemptions, told.preempted_ms, told.awaits, told.worker) == (2, 0.001, None, None)
    assert told.summary.startswith("Completed after")


def test_a_job_names_those_of_its_tenant_who_were_in_its_batch_and_counts_the_others(
    database: Database,
) -> None:
    worker = Worker.registered(database)
    mine, mate = insert_sent(database, new_job(), new_job())
    others = insert_sent(database, *(new_job(tenant="bakery") for _ in range(3)))

    worker.complete(worker.claim([mine, mate, *others]))

    told = explain(database, mine)
    [attempt] = told.attempts
    assert (attempt.batch.jobs, attempt.batch.mates, attempt.batch.others) == (5, [mate], 3)
    assert not any(str(each) in told.model_dump_json() for each in others)


def test_a_job_that_was_rescued_and_given_back_tells_what_each_attempt_took(
    database: Database,
) -> None:
    # given an attempt that was lost with its worker, and one that was given back
    lost, stopping, last = (Worker.registered(database) for _ in range(3))
    [job_id] = insert_sent(database, new_job())
    receive(lost, job_id)
    lost.claim([job_id])
    end_lease(database, lost.id)
    with database.begin() as connection:
        sweeps.expire_leases(connection, [job_id])
    waiting = explain(database, job_id)
    assert phases(waiting)[-2:] == [Phase.RUNNING, Phase.UNSENT]
    receive(stopping, job_id)
    [claimed] = stopping.claim([job_id])
    stopping.release(claimed, wasted_ns=700)

    # when a third answers
    receive(last, job_id)
    [claimed] = last.claim([job_id])
    last.finish(completed(claimed, wasted_ns=50, **an_answer(claimed)))

    # then
    told = explain(database, job_id)
    assert [each.outcome for each in told.attempts] == ["lost", "released", "succeeded"]
    assert [(each.billed_ns, each.wasted_ns) for each in told.attempts] == [
        (0, 0),
        (0, 700),
        (1_000, 50),
    ]
    assert (told.device.billed_ns, told.device.wasted_ns) == (1_000, 750)
    assert [span.attempt for span in told.spans if span.phase == Phase.RUNNING] == [1, 2]


def test_jobs_that_never_ran_tell_why_they_ended(database: Database) -> None:
    cancelled, expired = insert_sent(database, new_job(), new_job())
    unread = uuid4()
    with database.begin() as connection:
        cancellation.cancel(connection, cancelled)
        refused = RejectedJob(
            id=unread, kind=Kind.GENERATE, error_code="invalid_request", error_message="No JSON."
        )
        submissions.reject(connection, [refused])
    rewrite(database, "deadline = now()", expired)
    with database.begin() as connection:
        sweeps.expire_deadlines(connection, [expired])

    for job_id, code in ((cancelled, "cancelled"), (expired, "deadline_exceeded")):
        told = explain(database, job_id)
        assert (phases(told), told.attempts) == ([Phase.SENT], [])
        assert told.error and told.error.code == code
    told = explain(database, unread)
    assert (told.total_ms, told.spans, told.device.total_ns) == (0, [], 0)
    assert told.notes == ["Its message could not be read; that is all there is to tell."]


def test_a_job_that_was_out_of_attempts_ends_with_its_last_one(database: Database) -> None:
    worker = Worker.registered(database)
    [job_id] = insert_sent(database, new_job(max_attempts=1))
    [claimed] = worker.claim([job_id])

    state = worker.release(
        claimed, outcome=AttemptOutcome.FAILED, charged=True, error_code="x", wasted_ns=9
    )

    told = explain(database, job_id)
    assert (state, phases(told)[-1]) == (JobState.FAILED, Phase.RUNNING)
    assert told.device.wasted_ns == told.device.total_ns == 9


def test_a_purged_job_and_one_that_was_replayed_tell_so_and_keep_their_times(
    database: Database,
) -> None:
    worker = Worker.registered(database)
    [job_id] = insert_sent(database, new_job())
    [claimed] = worker.claim([job_id])
    worker.finish(completed(claimed, **an_answer(claimed)))
    before = explain(database, job_id)
    [replay] = insert(database, new_job(replay_of=job_id))

    with database.begin() as connection:
        purging.purge(connection, job_id)

    told = explain(database, job_id)
    assert (told.spans, told.device) == (before.spans, before.device)
    assert "What it asked and answered was removed; what it took is kept." in told.notes
    assert (told.replayed_by, explain(database, replay).replay_of) == (replay, job_id)


def test_what_attempts_did_after_their_job_was_read_is_left_out(database: Database) -> None:
    worker = Worker.registered(database)
    [job_id] = insert_sent(database, new_job())
    queued = view(database, job_id)
    [claimed] = worker.claim([job_id])
    running = view(database, job_id)
    worker.finish(completed(claimed, **an_answer(claimed)))
    with database.autocommit() as connection:
        met = surroundings.of_job(connection, running)
    later = view(database, job_id).attempts

    waits, runs = (timeline_of(replace(each, attempts=later), met) for each in (queued, running))

    assert (waits.attempts, waits.awaits, phases(waits)) == ([], "worker", [Phase.SENT])
    assert (runs.attempts[0].outcome, runs.awaits, phases(runs)[-1]) == (None, "engine", "running")
    assert not any(span.adjusted for span in (*waits.spans, *runs.spans))


def test_results_that_were_written_by_hand_add_up_as_well(database: Database) -> None:
    worker = Worker.registered(database)
    for assignment in (
        "inference_ms = 1e300",
        "inference_ms = 'NaN', preempted_ms = 'Infinity', preemptions = 1",
        "preempted_ms = NULL",
        "first_token_at = started_at - interval '1 day', queued_at = '0001-01-02Z'",
        "finished_at = created_at - interval '1 hour', total_ms = 0",
    ):
        [job_id] = insert_sent(database, new_job())
        [claimed] = worker.claim([job_id])
        worker.finish(completed(claimed, **an_answer(claimed)))
        with database.begin() as connection:
            connection.execute(
                text(f"UPDATE results SET {assignment} WHERE job_id = :id"), {"id": job_id}
            )

        told = explain(database, job_id)

        assert json.loads(told.model_dump_json())
        assert all(span.ms >= 0 for span in told.spans)


def test_rows_whose_batch_and_worker_are_deleted_are_still_told_of(database: Database) -> None:
    worker = Worker.registered(database)
    [job_id] = insert_sent(database, new_job())
    worker.complete(worker.claim([job_id]))
    with database.begin() as connection:
        connection.exec_driver_sql("DELETE FROM batches")
        connection.exec_driver_sql("DELETE FROM workers")

    [attempt] = explain(database, job_id).attempts

    assert (attempt.batch.jobs, attempt.worker.name) == (None, None)


@pytest.fixture
def api(settings: Settings) -> Iterator[httpx.Client]:
    with running_api(settings) as client:
        yield client


def test_the_api_tells_of_a_job_and_knows_no_other(api: httpx.Client) -> None:
    job_id = api.post("/v1/jobs", json={"body": {"prompt": "A grist mill is"}}).json()["id"]

    told = api.get(f"/v1/jobs/{job_id}/timeline").json()
    unknown = api.get(f"/v1/jobs/{uuid4()}/timeline")
    nonsense = api.get("/v1/jobs/%00/timeline?wait=1")

    assert (told["id"], told["state"], told["awaits"]) == (job_id, "queued", "no_worker")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "job_not_found")
    assert nonsense.status_code == 400
