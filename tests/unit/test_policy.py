"""The adaptive policy: how long a batch waits, by who comes and what batches take."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.jobs import CloseReason
from app.tune.replay import Arrival, Outcome, replay
from app.worker.batcher import Capacity, Limits
from app.worker.policy import Arrivals, CostFit, StepCost, closes_ns
from tests.unit.test_batcher import batcher, candidate

MS = 1_000_000
S = 1_000 * MS
COST = StepCost(100 * MS, 5 * MS)
LIMITS = Limits(64, 10**9, 500 * MS, wait_cost=0.01)
FIXED = dataclasses.replace(LIMITS, wait_cost=None)


def steady(gap_ns: int, count: int, rows: int = 1) -> list[Arrival]:
    return [Arrival(place * gap_ns, rows) for place in range(count)]


def poisson(rate_s: float, count: int, seed: int = 0) -> list[Arrival]:
    chance, at_s, trace = random.Random(seed), 0.0, []
    for _ in range(count):
        at_s += chance.expovariate(rate_s)
        trace.append(Arrival(int(at_s * S)))
    return trace


# ── what batches take ────────────────────────────────────────────────────────────────────────────


def test_nothing_is_known_before_a_batch_has_run() -> None:
    fit = CostFit()
    fit.add(0, 5)
    fit.add(5, 0)

    assert fit.cost is None


@settings(deadline=None)
@given(
    st.integers(1, 10**9),
    st.integers(0, 10**8),
    st.lists(st.integers(1, 64), min_size=10, max_size=60),
)
def test_the_fit_finds_what_batches_of_many_sizes_take(
    fixed_ns: int, row_ns: int, sizes: list[int]
) -> None:
    fit = CostFit()
    for rows in [1, 64, *sizes, 1, 64]:
        fit.add(rows, fixed_ns + row_ns * rows)

    assert fit.cost is not None
    for rows in (1, 20, 64):
        slack = 0.02 * (fixed_ns + row_ns * 64)
        assert fit.cost.of(rows) == pytest.approx(fixed_ns + row_ns * rows, abs=slack)


@given(st.lists(st.tuples(st.integers(1, 4096), st.integers(1, 10**13)), min_size=1, max_size=99))
def test_no_part_of_the_fit_is_ever_negative(batches: list[tuple[int, int]]) -> None:
    fit = CostFit()
    for rows, took_ns in batches:
        fit.add(rows, took_ns)

    assert fit.cost is not None
    assert fit.cost.row_ns >= 0
    assert fit.cost.fixed_ns >= -1e-6 * fit.cost.of(1)


def test_where_all_batches_have_one_size_half_of_their_time_is_taken_as_fixed() -> None:
    fit = CostFit()
    for _ in range(9):
        fit.add(4, 80)

    assert fit.cost is not None
    assert (fit.cost.fixed_ns, fit.cost.row_ns) == pytest.approx((40, 10))


def test_the_fit_forgets_what_batches_took_long_ago() -> None:
    fit = CostFit()
    for factor in (10, 1):
        for place in range(300):
            rows = 1 + place % 16
            fit.add(rows, factor * (100 + 5 * rows))

    assert fit.cost is not None
    assert fit.cost.of(8) == pytest.approx(140, rel=0.05)


# ── who comes ────────────────────────────────────────────────────────────────────────────────────


def arrivals(*at_ms: float, rows: int = 1) -> Arrivals:
    seen = Arrivals()
    for each in at_ms:
        seen.add(int(each * MS), rows)
    return seen


def closes_ms(rows: int, seen: Arrivals, oldest_ms: float, **changes: object) -> float:
    known = {"max_wait_ns": 10_000 * MS, "wait_cost": 0.01}
    return closes_ns(rows, int(oldest_ms * MS), seen, COST, **(known | changes)) / MS  # type: ignore[arg-type]


def test_a_job_that_comes_once_a_minute_waits_for_nobody() -> None:
    seen = arrivals(*(60_000 * place for place in range(5)))

    assert closes_ms(1, seen, 240_000) == 240_000


def test_while_many_come_a_batch_waits_and_when_they_stop_it_does_not() -> None:
    stream = [10 * place for place in range(20)]  # a hundred a second

    last = closes_ms(1, arrivals(*stream), 190)

    assert last > 190 + 100
    assert closes_ms(12, arrivals(*stream), 190) < last  # the more there are, the less is won


def test_after_a_silence_of_the_same_length_fewer_are_waited_for_the_longer_it_lasts() -> None:
    seen = arrivals(*(10 * place for place in range(20)))

    closes = [closes_ms(rows, seen, 190) for rows in range(1, 40)]

    assert closes == sorted(closes, reverse=True)
    assert closes[-1] == 190


def test_company_may_not_cost_more_than_max_wait_by_its_own_run_either() -> None:
    stream = arrivals(*(place for place in range(50)))

    alone = closes_ms(1, stream, 49, max_wait_ns=100 * MS)
    with_ten_mates = closes_ms(11, stream, 49, max_wait_ns=100 * MS)

    assert (alone, with_ten_mates) == (49 + 100, 49 + 100 - 10 * 5)


def test_nobody_waits_past_a_deadline_less_the_predicted_run() -> None:
    stream = arrivals(*(place for place in range(50)))

    closes = closes_ms(2, stream, 49, deadlines_ns=[10**15, 300 * MS])

    assert closes == 300 - (100 + 2 * 5)


def test_a_deadline_that_cannot_be_kept_any_more_asks_for_no_wait() -> None:
    stream = arrivals(*(place for place in range(50)))

    assert closes_ms(2, stream, 49, deadlines_ns=[50 * MS]) == 49


@given(
    rows=st.integers(1, 4096),
    oldest=st.integers(0, 10**18),
    times=st.lists(st.tuples(st.integers(0, 10**18), st.integers(1, 64)), max_size=20),
    fixed=st.floats(0, 1e15),
    row=st.floats(0, 1e15),
    max_wait=st.integers(0, 10**13),
    wait_cost=st.floats(1e-9, 1_000),
    deadlines=st.lists(st.integers(-(10**18), 10**18), max_size=3),
)
def test_whatever_is_measured_the_bounds_are_kept(
    rows: int,
    oldest: int,
    times: list[tuple[int, int]],
    fixed: float,
    row: float,
    max_wait: int,
    wait_cost: float,
    deadlines: list[int],
) -> None:
    seen = Arrivals()
    for each in times:
        seen.add(*each)
    cost = StepCost(fixed, row)

    closes = closes_ns(
        rows, oldest, seen, cost, max_wait_ns=max_wait, wait_cost=wait_cost, deadlines_ns=deadlines
    )

    assert oldest <= closes <= oldest + max_wait + 1e-9 * oldest
    if deadlines and closes > oldest:
        assert closes + cost.of(rows) <= min(deadlines) + 1 + 1e-9 * abs(min(deadlines))


# ── the batcher that asks it ─────────────────────────────────────────────────────────────────────


def test_an_engine_that_is_joined_later_has_nothing_to_adapt() -> None:
    joins = Capacity(free_rows=4, joins=True)

    adaptive, fixed = (batcher(candidate(), limits=each) for each in (LIMITS, FIXED))

    assert adaptive.next_close_ns({"g": joins}) == fixed.next_close_ns({"g": joins})


def test_before_a_batch_has_run_nobody_waits() -> None:
    waiting = batcher(candidate(arrived_ms=10), limits=LIMITS)

    closed = waiting.close("g", Capacity(64), now_ns=10 * MS)

    assert closed is not None
    assert closed.reason is CloseReason.WAIT


def test_a_batch_closes_when_the_batcher_said_that_it_would() -> None:
    waiting = batcher(*(candidate(arrived_ms=place) for place in range(5)), limits=LIMITS)
    waiting.note_ran("g", 4, 400 * MS)

    closes = waiting.next_close_ns({"g": Capacity(64)})

    assert closes is not None
    assert waiting.close("g", Capacity(64), closes - 1) is None
    assert waiting.close("g", Capacity(64), closes) is not None


def test_a_member_s_deadline_cuts_the_wait_short() -> None:
    waiting = batcher(*(candidate(arrived_ms=place) for place in range(5)), limits=LIMITS)
    waiting.note_ran("g", 1, 20 * MS)
    before = waiting.next_close_ns({"g": Capacity(64)})
    waiting.add(candidate(arrived_ms=5, expires_ns=100 * MS))

    closes = waiting.next_close_ns({"g": Capacity(64)})

    assert before is not None and closes is not None
    assert closes == 100 * MS - int(10 * MS + 6 * 10 * MS) < before


traces = st.lists(
    st.tuples(st.integers(0, 2_000), st.integers(1, 8), st.integers(1, 400)),
    min_size=1,
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(
    traces,
    st.integers(0, 400),
    st.integers(0, 50),
    st.integers(1, 32),
    st.integers(0, 2_000),
    st.floats(0.001, 10),
)
def test_whatever_comes_every_job_runs_once_within_size_and_wait(
    jobs: list[tuple[int, int, int]],
    fixed_ms: int,
    row_ms: int,
    max_size: int,
    wait_ms: int,
    wait_cost: float,
) -> None:
    trace, at_ms = [], 0
    for gap_ms, rows, tokens in jobs:
        at_ms += gap_ms
        trace.append(Arrival(at_ms * MS, rows, tokens, tokens))
    limits = Limits(max_size, 2_000, wait_ms * MS, wait_cost)

    outcome = replay(trace, limits, StepCost(1 + fixed_ms * MS, row_ms * MS))

    assert len(outcome.latencies_ns) == len(trace)
    assert max(outcome.sizes) <= max_size
    assert min(outcome.latencies_ns) >= 1
    # nobody waits for company beyond max_wait: what is more, the device was busy with others
    for wait_ns in outcome.waits_ns:
        assert wait_ns <= wait_ms * MS + outcome.device_ns


def test_under_saturation_batches_are_full() -> None:
    outcome = replay(poisson(1_000, 5_000), LIMITS, COST)

    assert sum(size == 64 for size in outcome.sizes) >= 0.95 * len(outcome.sizes)


def test_jobs_far_apart_are_as_quick_as_without_a_wait() -> None:
    outcome = replay(steady(60 * S, 50), LIMITS, COST)

    assert set(outcome.latencies_ns) == {COST.of(1)}


def test_when_the_rate_falls_a_hundredfold_only_few_wait_in_vain() -> None:
    busy = poisson(100, 2_000)
    quiet = [Arrival(busy[-1].at_ns + (place + 1) * 30 * S) for place in range(40)]

    outcome = replay([*busy, *quiet], LIMITS, COST)

    assert outcome.latencies_ns[-35:] == [COST.of(1)] * 35


def cheapest(outcomes: list[Outcome], p95_ns: float) -> int:
    return min((o.device_ns for o in outcomes if o.latency_ns(0.95) <= p95_ns), default=10**18)


def test_on_a_rate_that_changes_a_hundredfold_it_takes_less_of_the_device_than_any_fixed_wait() -> (
    None
):
    # given a rate that swings between 1 and 100 jobs a second, the latter near what the device can
    chance, at_s, trace = random.Random(1), 0.0, []
    for place in range(2_500):
        at_s += chance.expovariate(10 ** (1 - math.cos(place / 2_500 * 6 * math.pi)))
        trace.append(Arrival(int(at_s * S)))
    cost = StepCost(100 * MS, 8 * MS)

    # when both have the best of many settings that keep a p95 of 0.6 s
    fixed = [
        replay(trace, Limits(size, 10**9, wait * MS), cost)
        for size in (24, 32, 48)
        for wait in (200, 230, 260, 290, 320)
    ]
    adaptive = [
        replay(trace, Limits(48, 10**9, wait * MS, 0.01), cost) for wait in (400, 440, 480, 520)
    ]

    # then the adaptive one is cheaper
    assert cheapest(adaptive, 0.6 * S) <= 0.95 * cheapest(fixed, 0.6 * S)
