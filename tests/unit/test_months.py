"""Months: their order, their names, and the one that a time is in."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

from hypothesis import given
from hypothesis import strategies as st

from app.store.months import AHEAD, Month, upcoming


@given(st.integers(0, 200_000_000_000))
def test_a_time_is_in_its_month_and_in_no_other(seconds: int) -> None:
    stamp = datetime.fromtimestamp(seconds, UTC)
    month = Month.of(stamp)

    assert month.begin <= stamp < month.next.begin
    assert month < month.next
    assert month.begin.month != month.next.begin.month


def test_a_month_is_one_of_utc() -> None:
    late = datetime(2026, 12, 31, 23, 30, tzinfo=timezone(timedelta(hours=-5)))

    assert Month.of(late) == Month(2027, 1)


def test_the_next_months_are_made_ahead_over_the_turn_of_a_year() -> None:
    made = list(upcoming(datetime(2026, 12, 5, tzinfo=UTC)))

    assert made == [Month(2026, 12), Month(2027, 1), Month(2027, 2)]
    assert len(made) == 1 + AHEAD
    assert [month.partition("results") for month in made][:2] == [
        "results_2026_12",
        "results_2027_01",
    ]
