"""Dry runs: from what the intake expects to what the API shows. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from decimal import Decimal
from http import HTTPStatus
from typing import Final

from fastapi import Response

from app.api import problems
from app.api.jobs.schemas_quotes import (
    Between,
    BulkQuote,
    DeadlineOutlook,
    Expected,
    Quote,
    QuotedCost,
    QuotedTokens,
    QuoteItem,
)
from app.errors import GristmillError
from app.intake.outlook import Forecast
from app.intake.submit import Quoted

JSON: Final = "application/json"
NOT_KEPT: Final = {"Cache-Control": "private, no-cache"}


def answer_of(quoted: Sequence[Quoted | GristmillError]) -> Response:
    """The answer to a single dry run. Raises what a submission would be refused for."""
    [only] = quoted
    if isinstance(only, GristmillError):
        raise only
    return Response(quote_of(only).model_dump_json(), 200, NOT_KEPT, media_type=JSON)


def bulk_answer_of(quoted: Sequence[Quoted | GristmillError]) -> Response:
    items = [_item(index, each) for index, each in enumerate(quoted)]
    told = [item.quote for item in items if item.quote]
    bulk = BulkQuote(
        accepted=len(told),
        refused=len(items) - len(told),
        finish=_last(told),
        costs=list(_sums(told)),
        items=items,
    )
    return Response(bulk.model_dump_json(), 200, NOT_KEPT, media_type=JSON)


def quote_of(quoted: Quoted) -> Quote:
    job, forecast = quoted.job, quoted.forecast
    eta = forecast.eta
    finish = _expected(forecast, eta.p50_s, eta.p90_s) if eta else None
    return Quote(
        url=job.url,
        kind=job.kind,
        model=job.model,
        priority=job.priority,
        tokens=QuotedTokens(input_tokens=job.input_tokens, max_output_tokens=job.max_output_tokens),
        position=forecast.position,
        start=_expected(forecast, eta.start_p50_s, eta.start_p90_s) if eta else None,
        finish=finish,
        reason=forecast.reason,
        load_s=forecast.load_s,
        deadline=job.deadline,
        deadline_outlook=deadline_outlook(job.deadline, finish),
        cost=_cost(quoted),
        known_as=quoted.known_as,
    )


def deadline_outlook(deadline: datetime | None, finish: Expected | None) -> DeadlineOutlook | None:
    if deadline is None or finish is None:
        return None
    if finish.p90 <= deadline:
        return "met"
    return "at_risk" if finish.p50 <= deadline else "missed"


def _expected(forecast: Forecast, p50_s: float, p90_s: float) -> Expected:
    return Expected(p50=forecast.after(p50_s), p90=forecast.after(p90_s))


def _cost(quoted: Quoted) -> QuotedCost | None:
    if quoted.cost is None or quoted.price is None or quoted.price_id is None:
        return None
    low, high = quoted.cost
    return QuotedCost(
        amount=_between(low.amount, high.amount),
        charge=_between(low.charge, high.charge),
        currency=quoted.price.currency,
        price_id=quoted.price_id,
    )


def _between(low: Decimal | None, high: Decimal | None) -> Between | None:
    return None if low is None or high is None else Between(low=low, high=high)


def _item(index: int, quoted: Quoted | GristmillError) -> QuoteItem:
    if isinstance(quoted, GristmillError):
        problem = problems.describe(quoted, instance=f"/v1/jobs/bulk#/jobs/{index}")
        return QuoteItem(status=problem.status, error=problem)
    status = HTTPStatus.OK if quoted.known_as else HTTPStatus.ACCEPTED
    return QuoteItem(status=status, quote=quote_of(quoted))


def _last(quotes: Sequence[Quote]) -> Expected | None:
    ends = [quote.finish for quote in quotes if quote.finish]
    if not ends or len(ends) < len(quotes):
        return None
    return Expected(p50=max(end.p50 for end in ends), p90=max(end.p90 for end in ends))


def _sums(quotes: Iterable[Quote]) -> Iterable[QuotedCost]:
    by_price: defaultdict[tuple[str, str], list[QuotedCost]] = defaultdict(list)
    for quote in quotes:
        if quote.cost and quote.known_as is None:
            by_price[quote.cost.price_id, quote.cost.currency].append(quote.cost)
    for (price_id, currency), costs in by_price.items():
        yield QuotedCost(
            amount=_sum([cost.amount for cost in costs]),
            charge=_sum([cost.charge for cost in costs]),
            currency=currency,
            price_id=price_id,
        )


def _sum(parts: Sequence[Between | None]) -> Between | None:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return Between(
        low=sum((part.low for part in known), Decimal(0)),
        high=sum((part.high for part in known), Decimal(0)),
    )
