"""What a tenant may have: the rules alone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import QuotaExceeded
from app.intake.quotas import refuse_excess, refuse_overspending, spans
from app.store.quotas import Holding, Quotas

COUNTS = st.one_of(st.none(), st.integers(1, 100))
MONEY = st.decimals(0, 1000, places=4)
YEAR_2000 = datetime(2000, 1, 1, tzinfo=UTC)


def refusal(rule: Callable[[], None]) -> QuotaExceeded | None:
    try:
        rule()
    except QuotaExceeded as error:
        return error
    return None


@given(COUNTS, COUNTS, st.integers(0, 200), st.integers(0, 200))
def test_what_is_open_passes_no_limit(
    max_jobs: int | None, max_tokens: int | None, jobs: int, tokens: int
) -> None:
    quotas = Quotas(max_open_jobs=max_jobs, max_queued_tokens=max_tokens)
    fits = (max_jobs is None or jobs <= max_jobs) and (max_tokens is None or tokens <= max_tokens)

    refused = refusal(lambda: refuse_excess(quotas, Holding(jobs, tokens, {})))

    assert (refused is None) == fits
    assert refused is None or 1 <= refused.retry_after <= 60


@given(MONEY, MONEY, MONEY, st.floats(0, 40 * 86_400))
def test_what_is_spent_and_likely_to_be_passes_no_cap(
    most: Decimal, spent: Decimal, likely: Decimal, left_s: float
) -> None:
    refused = refusal(
        lambda: refuse_overspending("max_cost_per_day", most, spent, likely, "USD", left_s)
    )

    assert (refused is None) == (spent < most and spent + likely <= most)
    if refused is not None:
        assert 0 <= refused.retry_after <= 60
        assert bool(refused.retry_after) == (left_s <= 60)


@given(st.integers(0, 100 * 365 * 86_400))
def test_each_moment_is_in_its_day_and_month(seconds: int) -> None:
    now = YEAR_2000 + timedelta(seconds=seconds)
    quotas = Quotas(max_cost_per_day=Decimal(1), max_cost_per_month=Decimal(2), currency="USD")

    (day, _, day_begins, day_ends), (month, _, month_begins, month_ends) = spans(quotas, now)

    assert (day, month) == ("max_cost_per_day", "max_cost_per_month")
    assert month_begins <= day_begins <= now < day_ends <= month_ends
    assert (month_begins.day, month_ends.day) == (1, 1)


@pytest.mark.parametrize("cap", ["max_cost_per_day", "max_cost_per_month"])
def test_a_cap_alone_bounds_jobs(cap: str) -> None:
    assert Quotas(**{cap: Decimal(0)}, currency="USD").bounds_jobs  # type: ignore[arg-type]
    assert not Quotas(weight=5, max_requests_per_minute=1).bounds_jobs
