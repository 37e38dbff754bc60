"""From the store's rows to what the API shows. Pure."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from app.api import problems
from app.api.schemas import (
    Attempt,
    Batch,
    BulkItem,
    Cost,
    Energy,
    Eta,
    Job,
    JobError,
    JobSummary,
    Links,
    Timing,
    TokenUsage,
)
from app.books.energy import NJ_PER_J, UG_PER_G, EnergyMethod
from app.errors import GristmillError, JobUnreadable
from app.intake.outlook import Forecast
from app.intake.submit import Submitted
from app.jobs import REPLAYED, AttemptOutcome, CloseReason, JobState
from app.store.reads import AttemptView, BatchView, JobView, ResultView, Unreadable
from app.store.submissions import NewJob

T = TypeVar("T")

NS_PER_S: Final = 1_000_000_000


def job_of(view: JobView, forecast: Forecast | None = None) -> Job:
    response = view.result.response if view.result else None
    return Job(**_fields(view, forecast), response=response)


def summary_of(view: JobView, forecast: Forecast | None = None) -> JobSummary:
    return JobSummary(**_fields(view, forecast))


def told(tell: Callable[[JobView], T], view: JobView | Unreadable) -> T:
    """What `tell` makes of a job. Raises `JobUnreadable` if its row does not allow it."""
    if isinstance(view, Unreadable):
        raise view.error
    try:
        return tell(view)
    except ValidationError as error:
        where = ", ".join(".".join(map(str, each["loc"])) for each in error.errors())
        raise JobUnreadable(f"The job's row cannot be read: {where} is wrong.") from None
    except ValueError as error:
        raise JobUnreadable(f"The job's row cannot be read: {error}.") from None


def view_of_new(job: NewJob, now: datetime) -> JobView:
    """A job as its row has it when it is new."""
    return JobView(
        id=job.id,
        tenant=job.tenant,
        model=job.model,
        kind=job.kind,
        url=job.url,
        source=job.source,
        replay_of=job.replay_of,
        state=JobState.QUEUED,
        priority=job.priority,
        metadata=job.metadata,
        attempt=0,
        attempts_charged=0,
        max_attempts=job.max_attempts,
        input_tokens=job.input_tokens,
        max_output_tokens=job.max_output_tokens,
        not_before=job.not_before or now,
        deadline=job.deadline,
        cancel_requested_at=None,
        purged_at=None,
        created_at=now,
        queued_at=now,
        claimed_at=None,
        finished_at=None,
        attempts=(),
        result=None,
        batch=None,
    )


def eta_of(forecast: Forecast) -> Eta:
    eta = forecast.eta
    return Eta(
        p50=eta and forecast.after(eta.p50_s),
        p90=eta and forecast.after(eta.p90_s),
        reason=forecast.reason,
        load_s=forecast.load_s,
    )


def bulk_item(index: int, outcome: Submitted | GristmillError) -> BulkItem:
    """What became of the job at `index` of a bulk submission."""
    if isinstance(outcome, Submitted):
        return BulkItem(
            status=202 if outcome.created else 200,
            id=outcome.job_id,
            location=f"/v1/jobs/{outcome.job_id}",
        )
    problem = problems.describe(outcome, instance=f"/v1/jobs/bulk#/jobs/{index}")
    return BulkItem(status=problem.status, error=problem)


def _fields(view: JobView, forecast: Forecast | None) -> dict[str, Any]:
    result = view.result
    last = view.attempts[-1] if view.attempts else None
    return {
        "id": view.id,
        "state": view.state,
        "url": view.url,
        "kind": view.kind,
        "model": view.model,
        "priority": view.priority,
        "replay_of": view.replay_of,
        "created_at": view.created_at,
        "not_before": view.not_before,
        "deadline": view.deadline,
        "queued_at": view.queued_at,
        "claimed_at": view.claimed_at,
        "started_at": result.started_at if result else last and last.started_at,
        "first_token_at": result.first_token_at if result else None,
        "finished_at": view.finished_at,
        "cancel_requested_at": view.cancel_requested_at,
        "purged_at": view.purged_at,
        "max_attempts": view.max_attempts,
        "position": forecast and forecast.position,
        "eta": forecast and eta_of(forecast),
        "attempts": [_attempt(attempt) for attempt in view.attempts],
        "timing": result and Timing.model_validate(result, from_attributes=True),
        "usage": result and usage_of(result),
        "cost": result and cost_of(result),
        "energy": result and energy_of(result),
        "batch": view.batch and _batch(view.batch, result),
        "error": result and error_of(result),
        "metadata": view.metadata,
        "links": _links(view),
    }


def _attempt(view: AttemptView) -> Attempt:
    return Attempt(
        number=view.number,
        worker_id=view.worker_id,
        batch_id=view.batch_id,
        claimed_at=view.claimed_at,
        started_at=view.started_at,
        ended_at=view.ended_at,
        outcome=view.outcome and AttemptOutcome(view.outcome),
        charged=view.charged,
        device_seconds=None if view.device_ns is None else view.device_ns / NS_PER_S,
        wasted_seconds=None if view.wasted_ns is None else view.wasted_ns / NS_PER_S,
        cost=view.cost,
        energy_j=joules(view.energy_nj),
        wasted_j=joules(view.wasted_nj),
        energy_method=view.energy_method and EnergyMethod(view.energy_method),
        error_code=view.error_code,
    )


def usage_of(result: ResultView) -> TokenUsage | None:
    if result.input_tokens is None or result.output_tokens is None:
        return None
    return TokenUsage(
        input_tokens=result.input_tokens,
        cached_tokens=result.cached_tokens or 0,
        output_tokens=result.output_tokens,
        total_tokens=result.input_tokens + result.output_tokens,
    )


def cost_of(result: ResultView) -> Cost:
    return Cost(
        amount=result.cost,
        currency=result.currency,
        price_id=result.price_id,
        per_device_hour=result.price,
        upstream=result.upstream_cost,
        charge=result.charge,
        device_seconds=result.device_ns / NS_PER_S,
        wasted_seconds=result.wasted_ns / NS_PER_S,
    )


def energy_of(result: ResultView) -> Energy:
    return Energy(
        energy_j=joules(result.energy_nj),
        wasted_j=joules(result.wasted_nj),
        energy_method=EnergyMethod(result.energy_method),
        energy_boundary=result.energy_boundary,
        carbon_g=None if result.carbon_ug is None else result.carbon_ug / UG_PER_G,
    )


def joules(nj: int | None) -> float | None:
    return None if nj is None else nj / NJ_PER_J


def _batch(view: BatchView, result: ResultView | None) -> Batch:
    size = result.batch_size if result else None
    return Batch(
        id=view.id, size=size or view.num_sequences, close_reason=CloseReason(view.close_reason)
    )


def error_of(result: ResultView) -> JobError | None:
    if result.error_code is None:
        return None
    return JobError(code=result.error_code, message=result.error_message or "")


def _links(view: JobView) -> Links:
    here = f"/v1/jobs/{view.id}"
    return Links(
        self=here,
        cancel=None if view.state.is_final else f"{here}/cancel",
        replay=f"{here}/replay" if view.state in REPLAYED else None,
    )
