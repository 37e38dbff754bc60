"""How a job ends: from its generations to the record that the store commits. Pure.

What is decided here is written in one transaction; Celery hears of it afterwards (`telling`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final

from app.books.cost import device_cost, token_charge, upstream_cost
from app.books.energy import Paid, carbon_ug
from app.config.settings import PriceSettings
from app.engines.base import Generation
from app.engines.catalog import CatalogModel
from app.errors import GristmillError
from app.jobs import FinishReason, JobState, Usage
from app.requests import replies
from app.store.claims import BatchStats, Finished
from app.worker.energy.meter import EnergyMeter
from app.worker.work import Batch, Ending, Job, Run

NOT_STORED: Final = Ending.failed(GristmillError("The answer could not be stored."))


class Settlement:
    """Turns ended jobs into records, with their model's price on them, or else the worker's."""

    def __init__(
        self,
        price_id: str | None,
        prices: Mapping[str, PriceSettings],
        catalog: dict[str, CatalogModel],
        energy: EnergyMeter,
        grams_per_kwh: Decimal = Decimal(0),
    ) -> None:
        """`prices` by id; `price_id` is the worker's, None if its device has no price. A carbon
        intensity of 0 is none."""
        self._energy = energy
        self._grams_per_kwh = Fraction(grams_per_kwh)
        self._prices = prices
        self._price_ids = {
            name: model.settings.price or price_id for name, model in catalog.items()
        }
        self._catalog = catalog

    def settle(self, job: Job) -> Finished:
        """The record of a job that has ended: answered, cut short, or never run."""
        run = job.claimed_run
        answers = [each for each in run.generations if each is not None]
        ending = run.ending or _row_error(answers)
        usage = _usage(job, answers)
        has_answer = ending is None or usage.output_tokens > 0
        response = self._body(job, answers, ending) if has_answer else None
        return self._record(job, ending, answers, usage, response)

    def without_response(self, job: Job) -> Finished:
        """The record of a job whose answer cannot be stored: it fails, and is billed as it was."""
        answers = [each for each in job.claimed_run.generations if each is not None]
        return self._record(job, NOT_STORED, answers, _usage(job, answers), None)

    def _record(
        self,
        job: Job,
        ending: Ending | None,
        answers: list[Generation],
        usage: Usage,
        response: dict[str, Any] | None,
    ) -> Finished:
        run = job.claimed_run
        return Finished(
            job_id=job.id,
            attempt_id=run.attempt_id,
            created_at=run.created_at,
            state=ending.state if ending else JobState.COMPLETED,
            response=response,
            error_code=ending.code if ending else None,
            error_message=ending.message if ending else None,
            input_tokens=usage.input_tokens,
            cached_tokens=usage.cached_tokens,
            output_tokens=usage.output_tokens,
            batch_wait_ms=job.batch_wait_ns / 1e6,
            batch_size=run.batch.num_jobs,
            device_ns=run.device_ns,
            wasted_ns=run.wasted_ns,
            **self._bill(job, usage, answers),
            **_breakdown(run.device_ns, answers),
            **self._joules(run),
            **_times(run, answers),
        )

    def _bill(self, job: Job, usage: Usage, answers: list[Generation]) -> dict[str, Any]:
        """Fields of `Finished`."""
        if (price_id := self._price_ids[job.model]) is None:
            return {"cost": None}
        price = self._prices[price_id]
        asked = [each.charge for each in answers if each.charge is not None]
        upstream = upstream_cost(price, usage, asked)
        return {
            "cost": device_cost(job.claimed_run.device_ns, price.per_device_hour) + (upstream or 0),
            "upstream_cost": upstream,
            "currency": price.currency,
            "price_id": price_id,
            "price": price.per_device_hour,
            "charge": token_charge(price, usage),
        }

    def paid(self, run: Run) -> Paid:
        """The energy of an attempt that ended."""
        run.paid = run.paid or self._energy.pay(run.device_ns, run.wasted_ns)
        return run.paid

    def _joules(self, run: Run) -> dict[str, Any]:
        """Fields of `Finished`."""
        paid, grams = self.paid(run), self._grams_per_kwh
        if paid.energy_nj is None:
            return {}
        return {
            "energy_nj": paid.energy_nj,
            "wasted_nj": paid.wasted_nj,
            "energy_method": paid.method,
            "energy_boundary": self._energy.source.boundary,
            "carbon_ug": carbon_ug(paid.energy_nj, grams) if grams else None,
        }

    def _body(self, job: Job, answers: list[Generation], ending: Ending | None) -> dict[str, Any]:
        served = self._catalog[job.model]
        return replies.body(
            job.request,
            answers,
            job_id=str(job.id),
            model=f"{job.model}:{adapter}" if (adapter := job.request.adapter) else job.model,
            created=int(time.time()),
            tokenizer=served.tokenizer,
            prompts=job.prepared.prompts,
            labels=served.card.labels,
            state=ending.state if ending else JobState.COMPLETED,
            error_code=ending.code if ending else None,
            error_message=ending.message if ending else None,
        )


def batch_stats(batch: Batch) -> BatchStats:
    """What a batch has computed so far."""
    return BatchStats(
        batch.id, batch.useful_tokens, batch.padded_tokens, batch.device_ns, batch.num_claimed
    )


def _usage(job: Job, answers: list[Generation]) -> Usage:
    """Nothing counts of a job that was cut short before all its answers were there."""
    return replies.usage(job.request, answers) if job.claimed_run.is_over else Usage()


def _row_error(answers: list[Generation]) -> Ending | None:
    for answer in answers:
        if answer.finish_reason is FinishReason.ERROR:
            return Ending(
                JobState.FAILED,
                answer.error_code or "engine_error",
                answer.error_message or "The engine could not run this sequence.",
            )
    return None


def _breakdown(device_ns: int, answers: list[Generation]) -> dict[str, Any]:
    """What device time was for, and no more of it than there is, whatever an engine says; nothing
    where it does not tell."""
    known = [each.breakdown for each in answers if each.breakdown is not None]
    if not known or len(known) < len(answers):
        return {}
    prefill_ns = min(device_ns, max(0, sum(each.prefill_ns for each in known)))
    recomputed_ns = max(0, sum(each.recomputed_ns for each in known))
    return {
        "prefill_ns": prefill_ns,
        "recomputed_ns": min(device_ns - prefill_ns, recomputed_ns),
        "preemptions": max(0, sum(each.preemptions for each in known)),
        "preempted_ms": max(0, sum(each.preempted_ns for each in known)) / 1e6,
    }


def _times(run: Run, answers: list[Generation]) -> dict[str, Any]:
    """Stamps on the database's clock, and the engine's time in milliseconds."""
    if not run.is_over:
        return {}
    began = min(each.started_ns for each in answers)
    first = min(each.first_token_ns or each.finished_ns for each in answers)
    ended = max(each.finished_ns for each in answers)
    return {
        "started_at": run.stamp(began),
        "first_token_at": run.stamp(first),
        "inference_ms": max(0, ended - began) / 1e6,
    }
