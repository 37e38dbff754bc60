"""When a webhook is tried again: by the schedule, within three days, and not all at once."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from app.webhooks.schedule import (
    JITTER,
    MAX_PAUSE_S,
    MIN_PAUSE_S,
    TRIP,
    WAITS_S,
    WINDOW_S,
    pause_s,
    wait_s,
)

HOUR_S = 3_600


def attempts_at(chance: float, retry_after_s: float | None = None) -> list[float]:
    """When a receiver that never answers is tried, in seconds since the event."""
    at_s, found = 0.0, [0.0]
    while (wait := wait_s(len(found), at_s, chance, retry_after_s)) is not None:
        at_s += wait
        found.append(at_s)
    return found


def test_a_receiver_that_never_answers_is_tried_ten_times_in_three_days() -> None:
    hours = [at / HOUR_S for at in attempts_at(0.5)]

    assert [round(each, 2) for each in hours] == [
        0, 0, 0.08, 0.58, 2.58, 7.58, 17.58, 31.58, 51.58, 72,
    ]  # fmt: skip


@given(st.floats(0, 1), st.one_of(st.none(), st.floats(0, 1e9)))
def test_waits_never_end_and_never_leave_the_window(chance: float, asked: float | None) -> None:
    found = attempts_at(chance, asked)

    assert 2 <= len(found) <= len(WAITS_S) + 1
    assert found == sorted(found) and found[-1] <= WINDOW_S + 1e-6


@given(st.integers(1, len(WAITS_S)), st.floats(0, 1), st.floats(0, 1e6))
def test_a_receiver_may_ask_for_a_longer_wait_and_not_for_a_shorter_one(
    attempts: int, chance: float, asked_s: float
) -> None:
    own, longer = wait_s(attempts, 0, chance), wait_s(attempts, 0, chance, asked_s)

    assert own is not None and longer is not None
    assert abs(own - WAITS_S[attempts - 1]) <= JITTER * WAITS_S[attempts - 1] + 1e-6
    assert longer == min(max(own, asked_s), WINDOW_S)


@given(st.integers(-5, 100), st.floats(WINDOW_S, 1e12))
def test_after_three_days_it_is_given_up(attempts: int, age_s: float) -> None:
    assert wait_s(attempts, age_s, 0.5, 5.0) is None


def test_what_failed_together_comes_apart() -> None:
    waits = {wait_s(3, 0, random.random()) for _ in range(100)}

    assert len(waits) > 90


@given(st.integers(0, 10**9))
def test_a_receiver_rests_longer_and_longer_and_never_for_good(failures: int) -> None:
    pause = pause_s(failures)

    assert (pause is None) == (failures < TRIP)
    assert pause is None or MIN_PAUSE_S <= pause <= MAX_PAUSE_S
    assert pause is None or (pause_s(failures + 1) or 0) >= pause
