"""From a job's rows to its timeline. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from app.api import views
from app.api.jobs.schemas_timeline import (
    Device,
    DevicePart,
    Timeline,
    TimelineAttempt,
    TimelineBatch,
    TimelineSpan,
    TimelineWorker,
)
from app.books.cost import in_nano, money
from app.books.timeline import Awaits, Life, Span, Taken, Try, Use, awaits, spans, taken
from app.jobs import LATEST, AttemptOutcome, CloseReason, JobState, Kind
from app.store.reads import AttemptView, JobView, ResultView
from app.store.surroundings import Surroundings

AWAITED: Final = {
    Awaits.TIME: "it is not due before {not_before}",
    Awaits.SENDING: "rescue is to send its message, as soon as the queue has room",
    Awaits.WORKER: "its message is in Redis, for a worker with room",
    Awaits.NO_WORKER: "no worker that is up serves the model",
    Awaits.BATCH: "a worker has it, and waits for company or for room in the engine",
    Awaits.ENGINE: "it is in a batch that a worker has claimed",
    Awaits.STOP: "it was cancelled, and its worker is to stop it",
    Awaits.RESCUE: "the worker that has it is lost, and rescue is to take it back",
}


def timeline_of(job: JobView, met: Surroundings) -> Timeline:
    job = _at_one_moment(job)
    life = _life(job, met)
    parts = spans(life)
    total_ms = _ms(sum(span.us for span in parts))
    awaited = None if job.state.is_final else _awaits(job, life, met)
    return Timeline(
        id=job.id,
        state=job.state,
        summary=_summary(job, total_ms, awaited),
        model=job.model,
        kind=Kind(job.kind),
        created_at=job.created_at,
        until=max(life.created_at, life.until),
        total_ms=total_ms,
        spans=[_span(span) for span in parts],
        awaits=awaited,
        worker=_worker(job.worker_id, met) if job.worker_id else None,
        attempts=[_attempt(each, life, met) for each in job.attempts],
        device=_device(life),
        preemptions=job.result and job.result.preemptions,
        preempted_ms=job.result and job.result.preempted_ms,
        usage=job.result and views.usage_of(job.result),
        cost=job.result and views.cost_of(job.result),
        energy=job.result and views.energy_of(job.result),
        error=job.result and views.error_of(job.result),
        replay_of=job.replay_of,
        replayed_by=met.replayed_by,
        notes=list(_notes(job, parts)),
    )


def _at_one_moment(job: JobView) -> JobView:
    """Attempts are read after their job: what they did in between is left out."""
    known = [each for each in job.attempts if each.number <= job.attempt]
    if job.state is JobState.RUNNING and known and known[-1].ended_at is not None:
        known[-1] = replace(
            known[-1],
            ended_at=None,
            outcome=None,
            charged=None,
            device_ns=None,
            wasted_ns=None,
            cost=None,
            energy_nj=None,
            wasted_nj=None,
            error_code=None,
        )
    return replace(job, attempts=tuple(known))


def _life(job: JobView, met: Surroundings) -> Life:
    if job.state.is_final:
        waits = job.result is None or job.result.attempt_id is None
    else:
        waits = job.state is JobState.QUEUED
    return Life(
        created_at=job.created_at,
        until=job.finished_at or met.now,
        tries=[_try(each, job) for each in job.attempts],
        waits=waits,
        not_before=job.not_before,
        sent_at=job.enqueued_at,
        received_at=job.received_at,
    )


def _try(attempt: AttemptView, job: JobView) -> Try:
    tried = Try(
        number=attempt.number,
        claimed_at=attempt.claimed_at,
        ended_at=attempt.ended_at,
        started_at=attempt.started_at,
        device_ns=attempt.device_ns or 0,
        wasted_ns=attempt.wasted_ns or 0,
        energy_nj=attempt.energy_nj,
        wasted_nj=attempt.wasted_nj,
    )
    result = job.result
    if result is None or result.attempt_id != attempt.id:
        return tried
    return replace(
        tried,
        started_at=result.started_at,
        first_token_at=result.first_token_at,
        last_token_at=_later(result.started_at, result.inference_ms),
        prefill_ns=result.prefill_ns,
        recomputed_ns=result.recomputed_ns or 0,
        cost_nano=_device_cost(result),
    )


def _later(stamp: datetime | None, ms: float | None) -> datetime | None:
    if stamp is None or ms is None:
        return None
    try:
        return stamp + timedelta(milliseconds=ms)
    except (OverflowError, ValueError):  # written by hand
        return LATEST


def _device_cost(result: ResultView) -> int | None:
    """In nano-units: without what servers elsewhere asked for."""
    if result.cost is None:
        return None
    return in_nano(result.cost - (result.upstream_cost or 0))


def _awaits(job: JobView, life: Life, met: Surroundings) -> Awaits:
    holder = met.workers.get(job.worker_id) if job.worker_id else None
    is_up = None if job.worker_id is None else holder is not None and holder.is_up
    return awaits(
        life,
        holder_is_up=is_up,
        num_workers=met.num_workers,
        is_cancelled=job.cancel_requested_at is not None,
    )


def _summary(job: JobView, total_ms: float, awaited: Awaits | None) -> str:
    if awaited is None:
        return f"{job.state.capitalize()} after {total_ms:,.3f} ms."
    why = AWAITED[awaited].format(not_before=f"{job.not_before:%Y-%m-%d %H:%M:%S} UTC")
    return f"{job.state.capitalize()}, {total_ms:,.3f} ms after it was accepted: {why}."


def _notes(job: JobView, parts: list[Span]) -> Iterator[str]:
    if not job.model:
        yield "Its message could not be read; that is all there is to tell."
    elif job.source == "message":
        yield "Its message brought it: how long that had been in Redis is not known."
    if job.wake_count:
        yield f"Its message seemed lost and was sent again: {job.wake_count} times."
    if any(span.is_adjusted for span in parts):
        yield "A clock was set while it was there: some times are cut to what is certain."
    if job.cancel_requested_at is not None:
        yield f"It was to be cancelled while it ran: {job.cancel_requested_at:%H:%M:%S.%f} UTC."
    if job.deadline is not None and not job.state.is_final:
        yield f"It expires if it has not ended by {job.deadline:%Y-%m-%d %H:%M:%S} UTC."
    if job.purged_at is not None:
        yield "What it asked and answered was removed; what it took is kept."
    result = job.result
    if result is None:
        return
    if result.device_ns and result.prefill_ns is None:
        yield "Its engine does not tell the device time of the prompt from that of the output."
    if result.preemptions:
        yield (
            f"It gave way to others in the engine: {result.preemptions} times, for "
            f"{result.preempted_ms or 0:,.3f} ms."
        )


def _span(span: Span) -> TimelineSpan:
    return TimelineSpan(
        phase=span.phase,
        attempt=span.attempt,
        began_at=span.began_at,
        ended_at=span.ended_at,
        ms=_ms(span.us),
        adjusted=span.is_adjusted,
    )


def _attempt(view: AttemptView, life: Life, met: Surroundings) -> TimelineAttempt:
    lasted = (view.ended_at or life.until) - view.claimed_at
    return TimelineAttempt(
        number=view.number,
        worker=_worker(view.worker_id, met),
        batch=_batch(view.batch_id, met),
        claimed_at=view.claimed_at,
        ended_at=view.ended_at,
        ms=_ms(max(0, lasted // timedelta(microseconds=1))),
        outcome=view.outcome and AttemptOutcome(view.outcome),
        charged=view.charged,
        error_code=view.error_code,
        billed_ns=view.device_ns or 0,
        wasted_ns=view.wasted_ns or 0,
        cost=view.cost,
    )


def _worker(id: UUID, met: Surroundings) -> TimelineWorker:
    """What is known of a worker; its row may be deleted."""
    if (worker := met.workers.get(id)) is None:
        return TimelineWorker(id=id, name=None, host=None, up=False)
    return TimelineWorker(id=id, name=worker.name, host=worker.host, up=worker.is_up)


def _batch(id: UUID, met: Surroundings) -> TimelineBatch:
    """What is known of a batch; its row may be deleted."""
    if (batch := met.batches.get(id)) is None:
        unknown = dict.fromkeys(("engine", "close_reason", "wait_ms", "jobs", "sequences"))
        return TimelineBatch(id=id, mates=[], others=0, **unknown)
    return TimelineBatch(
        id=id,
        engine=batch.engine,
        close_reason=CloseReason(batch.close_reason),
        wait_ms=batch.wait_ms,
        jobs=batch.num_jobs,
        sequences=batch.num_sequences,
        mates=list(batch.mates),
        others=max(0, batch.num_jobs - 1 - len(batch.mates)),
    )


def _device(life: Life) -> Device:
    parts = taken(life.tries)
    total_ns = sum(part.ns for part in parts)
    wasted_ns = sum(part.ns for part in parts if part.use is Use.WASTED)
    return Device(
        total_ns=total_ns,
        billed_ns=total_ns - wasted_ns,
        wasted_ns=wasted_ns,
        parts=[_part(part) for part in parts],
    )


def _part(part: Taken) -> DevicePart:
    cost = None if part.cost_nano is None else money(part.cost_nano)
    return DevicePart(
        attempt=part.attempt,
        use=part.use,
        ns=part.ns,
        cost=cost,
        energy_j=views.joules(part.energy_nj),
    )


def _ms(us: int) -> float:
    """Exact to the microsecond: the nearest double to three decimals, which is written as those."""
    return us / 1_000
