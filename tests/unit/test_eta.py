"""When jobs will have ended: the rules, whatever they are given, and a bursty trace."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.books import calibration, eta, work
from app.books.calibration import Calibration, Ended
from app.books.eta import Ahead, Experience, Pace
from app.books.quote import cost_range
from app.books.work import NOTHING, Size, Weights
from app.config.settings import PriceSettings

NOBODY = UUID(int=0)
WORKERS = [(0.0, 1e9)]

seconds = st.floats(0, 1e7)
tokens = st.integers(0, 100_000)
sizes = st.builds(Size, st.just(1.0), tokens.map(float), tokens.map(float))
amounts = st.builds(Size, st.floats(0, 1e6), st.floats(0, 1e9), st.floats(0, 1e9))


def job(
    due_s: float, waited_s: float = 0.0, ran_s: float = 1.0, size: Size | None = None, **more: Any
) -> Ended:
    size = size or Size(1.0, 10.0, 20.0)
    told: dict[str, Any] = {"estimate_s": None, "p90_s": None} | more
    return Ended(
        job_id=NOBODY,
        due_s=due_s,
        started_s=due_s + waited_s,
        ended_s=due_s + waited_s + ran_s,
        size=size,
        max_output_tokens=told.pop("max_output_tokens", round(size.output_tokens * 2)),
        device_s=told.pop("device_s", ran_s / 4),
        **told,
    )


@st.composite
def jobs(draw: st.DrawFn) -> Ended:
    promised = draw(st.none() | st.tuples(seconds, seconds))
    return job(
        draw(seconds),
        draw(st.floats(-10, 1e5)),  # clocks may jump
        draw(st.floats(-10, 1e5)),
        draw(sizes),
        device_s=draw(st.integers(0, 10**13)) / 1e9,
        max_output_tokens=draw(tokens),
        estimate_s=promised[0] if promised else None,
        p90_s=promised[1] if promised else None,
    )


def pace_of(history: list[Ended], waiting: list[tuple[float, float]] | None = None) -> Pace | None:
    experience = Experience()
    experience.add(history)
    now_s = max((each.ended_s for each in history), default=0.0)
    return experience.pace(waiting or [], WORKERS, now_s)


histories = st.lists(jobs(), min_size=1, max_size=60)


# ── rules that hold whatever happened ───────────────────────────────────────────────────────────


@given(histories, sizes, amounts, amounts, amounts, st.integers(1, 100), st.integers(1, 1000))
def test_no_time_is_negative_and_p50_never_comes_after_p90(
    history: list[Ended],
    size: Size,
    queued: Size,
    running: Size,
    urgent: Size,
    workers: int,
    places: int,
) -> None:
    pace = pace_of(history)
    assert pace is not None

    estimate_s = pace.estimate_s(size, Ahead(queued, running, urgent), workers, places)
    told = pace.eta(size, estimate_s)

    assert 0 < estimate_s < float("inf")
    assert 0 <= told.start_p50_s <= told.start_p90_s
    assert 0 <= told.p50_s <= told.p90_s < float("inf")
    assert told.start_p50_s <= told.p50_s
    assert told.start_p90_s <= told.p90_s


@given(histories, sizes, amounts, amounts, amounts, amounts, st.integers(1, 1000))
def test_more_ahead_never_gives_an_earlier_time(
    history: list[Ended],
    size: Size,
    queued: Size,
    more: Size,
    running: Size,
    urgent: Size,
    places: int,
) -> None:
    pace = pace_of(history)
    assert pace is not None

    def told(ahead: Ahead) -> eta.Eta:
        return pace.eta(size, pace.estimate_s(size, ahead, 1, places))

    before = told(Ahead(queued, running, urgent))
    for ahead in (
        Ahead(queued + more, running, urgent),
        Ahead(queued, running + more, urgent),
        Ahead(queued, running, urgent + more),
    ):
        after = told(ahead)
        assert after.p50_s >= before.p50_s * (1 - 1e-9)
        assert after.p90_s >= before.p90_s * (1 - 1e-9)


@given(histories, sizes, amounts, st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_job_that_is_due_later_waits_no_longer_from_then(
    history: list[Ended], size: Size, queued: Size, sooner_s: float, more_s: float
) -> None:
    pace = pace_of(history)
    assert pace is not None
    ahead = Ahead(queued, NOTHING)

    soon = pace.estimate_s(size, ahead, 1, 1, sooner_s)
    late = pace.estimate_s(size, ahead, 1, 1, sooner_s + more_s)

    assert late <= soon
    assert late + sooner_s + more_s >= soon + sooner_s - 1e-6 * soon


def test_without_history_there_is_no_pace() -> None:
    assert Experience().pace([], WORKERS, 0.0) is None
    assert Experience().share_kept is None


@given(st.lists(st.tuples(sizes, st.floats(0, 1e6)), min_size=1, max_size=30))
def test_fitted_weights_are_never_negative(rows: list[tuple[Size, float]]) -> None:
    weights = work.fit([size for size, _ in rows], [cost for _, cost in rows])

    assert weights.per_job >= 0
    assert weights.per_input_token >= 0
    assert weights.per_output_token >= 0


@given(st.floats(0, 10), st.floats(0, 0.1), st.floats(0, 1))
def test_a_cost_that_is_made_of_its_parts_is_found(
    per_job: float, per_input: float, per_output: float
) -> None:
    weights, chance = Weights(per_job, per_input, per_output), random.Random(1)
    given_sizes = [Size(1.0, chance.randint(1, 2000), chance.randint(1, 500)) for _ in range(40)]

    found = work.fit(given_sizes, [weights.of(size) for size in given_sizes])

    asked = Size(1.0, 700.0, 90.0)
    assert found.of(asked) == pytest.approx(weights.of(asked), rel=1e-3, abs=1e-6)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_a_quantile_is_a_value_that_so_many_do_not_exceed(
    values: list[float], level: float
) -> None:
    found = calibration.quantile([(value, 1.0) for value in sorted(values)], level)

    assert found in values
    assert sum(value <= found for value in values) >= level * len(values) * (1 - 1e-9)


# ── what is measured ────────────────────────────────────────────────────────────────────────────


def test_the_pace_is_that_of_full_queues_and_not_of_idle_hours() -> None:
    # given a job an hour, and then forty at once of which four are done a second
    lone = [job(3600.0 * hour) for hour in range(10)]
    at_once = [job(40_000.0, place // 4, 1.0) for place in range(40)]

    pace = pace_of(lone + at_once)

    assert pace is not None
    jobs_a_second = pace.drained_a_second / pace.work.of(Size(1.0, 10.0, 20.0))
    assert jobs_a_second == pytest.approx(4.0, rel=0.15)


def test_two_workers_drain_twice_as_fast_as_one() -> None:
    pace = pace_of([job(0.0, place // 4, 1.0) for place in range(40)])
    assert pace is not None
    ahead = Ahead(Size(1000.0, 10_000.0, 20_000.0), NOTHING)

    one, two = (pace.estimate_s(NOTHING, ahead, workers, 1) for workers in (1, 2))

    assert one == pytest.approx(2 * two)


def test_what_is_more_urgent_and_keeps_coming_slows_down_but_never_stops() -> None:
    pace = pace_of([job(0.0, place // 4, 1.0) for place in range(40)])
    assert pace is not None
    queued, one = Size(100.0, 1_000.0, 2_000.0), Size(1.0, 10.0, 20.0)

    alone, half, flood = (
        pace.estimate_s(one, Ahead(queued, NOTHING, one.times(rate)), 1, 1) for rate in (0, 2, 1000)
    )

    assert alone < half < flood <= 16 * alone


def test_without_measured_device_time_all_jobs_count_alike() -> None:
    pace = pace_of([job(0.0, place // 4, 1.0, device_s=0.0) for place in range(40)])

    assert pace is not None
    assert (pace.work, pace.device) == (work.ONE_EACH, None)
    assert pace.drained_a_second == pytest.approx(4.0, rel=0.15)


def test_what_a_worker_has_still_to_load_is_what_others_took_less_its_age() -> None:
    assert eta.start_of([], 100.0) == eta.Start(0, None, None)
    assert eta.start_of([(90.0, None)], 100.0) == eta.Start(1, None, None)
    assert eta.start_of([(90.0, None), (0.0, 30.0)], 100.0) == eta.Start(1, 30.0, 20.0)
    assert eta.start_of([(60.0, None), (0.0, 30.0)], 100.0) == eta.Start(1, 30.0, 0.0)
    assert eta.start_of([(0.0, None), (0.0, 30.0)], 1000.0) == eta.Start(0, 30.0, None)


# ── what estimates were worth ───────────────────────────────────────────────────────────────────


def test_an_estimate_that_is_always_half_of_it_is_doubled() -> None:
    lessons = [job(2.0 * n, 9.0, 1.0, estimate_s=5.0, p90_s=None) for n in range(100)]

    p50_s, p90_s = Calibration.of(lessons).at(5.0)

    assert p50_s == pytest.approx(10.0)
    assert p90_s == pytest.approx(10.0)


def test_estimates_of_different_sizes_are_wrong_in_different_ways() -> None:
    short = [job(2.0 * n, 2.0, 1.0, estimate_s=1.0) for n in range(100)]
    long = [job(2.0 * n, 50.0, 50.0, estimate_s=100.0) for n in range(100)]

    calibration = Calibration.of(sorted(short + long, key=lambda each: each.ended_s))

    assert calibration.at(1.0)[0] == pytest.approx(3.0, rel=0.01)
    assert calibration.at(100.0)[0] == pytest.approx(100.0, rel=0.01)


def test_promises_that_are_broken_are_made_longer_and_kept_ones_shorter() -> None:
    lessons = [job(2.0 * n, 9.0, 1.0, estimate_s=10.0) for n in range(100)]
    plain = Calibration.of(lessons).at(10.0)[1]

    broken = Calibration.of([replace(each, p90_s=9.0) for each in lessons]).at(10.0)[1]
    kept = Calibration.of([replace(each, p90_s=99.0) for each in lessons]).at(10.0)

    assert broken > plain
    assert kept[1] == kept[0]  # and never shorter than the median


def test_the_share_that_was_kept_counts_all_that_were_promised() -> None:
    experience = Experience()
    experience.add([job(0.0, p90_s=2.0), job(0.0, p90_s=0.5), job(0.0), job(0.0, p90_s=1.0)])

    assert experience.num_promised == 3
    assert experience.share_kept == pytest.approx(2 / 3)


# ── what it costs ───────────────────────────────────────────────────────────────────────────────

PRICE = PriceSettings(per_device_hour=Decimal("3.6"), currency="USD")
TARIFF = PriceSettings(
    per_device_hour=Decimal(0),
    per_million_input_tokens=Decimal(1),
    per_million_output_tokens=Decimal(10),
    currency="USD",
)


@given(histories, sizes)
def test_the_least_cost_is_never_more_than_the_most(history: list[Ended], size: Size) -> None:
    low, high = cost_range(PRICE, size, pace_of(history))

    assert low.amount is not None
    assert high.amount is not None
    assert 0 <= low.amount <= high.amount


def test_a_job_like_the_others_costs_what_they_did() -> None:
    history = [job(10.0 * n, ran_s=2.0, device_s=0.5) for n in range(30)]
    asked = Size(1.0, 10.0, 40.0)  # of which half is generated, as ever

    low, high = cost_range(PRICE, asked, pace_of(history))

    assert low.amount == high.amount == Decimal("0.0005")


def test_without_history_only_tokens_have_a_cost() -> None:
    asked = Size(1.0, 1000.0, 500.0)

    assert [each.amount for each in cost_range(PRICE, asked, None)] == [None, None]
    low, high = cost_range(TARIFF, asked, None)
    assert (low.charge, high.charge) == (Decimal("0.001"), Decimal("0.006"))
    assert (low.amount, high.amount) == (low.charge, high.charge)


# ── a bursty trace ──────────────────────────────────────────────────────────────────────────────


class Trace:
    """Bursts of jobs at a worker that runs batches of eight, each as long as its longest job."""

    BATCH, STEP_S = 8, 0.1

    def __init__(self, seed: int, bursts: int) -> None:
        self.chance = random.Random(seed)
        self.arrivals = deque(sorted(self._arrivals(bursts)))
        self.queue: deque[Ended] = deque()
        self.inside: list[Ended] = []
        self.experience = Experience()
        self.ended: list[Ended] = []

    def _arrivals(self, bursts: int) -> list[tuple[float, int]]:
        arrivals: list[tuple[float, int]] = []
        at_s = 0.0
        for _ in range(bursts):
            number = self.chance.choice([1, 1, 2, 10, 20, 40])
            arrivals += [
                (at_s + 0.01 * place, self.chance.choice([1, 2, 3, 5, 8, 10]))
                for place in range(number)
            ]
            at_s += self.chance.uniform(1, 4) + 0.12 * number * self.chance.uniform(0.5, 1.2)
        return arrivals

    def play(self) -> None:
        look_s = free_s = 0.0
        pace, seen, inside, since = None, NOTHING, NOTHING, NOTHING
        while self.arrivals or self.queue or self.inside:
            now_s = min(
                look_s,
                self.arrivals[0][0] if self.arrivals else look_s,
                free_s if self.inside else look_s,
            )
            if self.inside and now_s >= free_s:
                self.experience.add(self.inside)
                self.ended += self.inside
                self.inside = []
            elif self.arrivals and now_s >= self.arrivals[0][0]:
                size = Size(1.0, 1.0, float(self.arrivals.popleft()[1]))
                self.queue.append(self._promised(now_s, size, pace, Ahead(seen + since, inside)))
                since += size
            else:
                waiting = [(each.due_s, 1.0) for each in self.queue]
                pace = self.experience.pace(waiting, WORKERS, now_s)
                seen = sum((each.size for each in self.queue), NOTHING)
                inside = sum((each.size for each in self.inside), NOTHING)
                since, look_s = NOTHING, look_s + 1.0
            if self.queue and not self.inside:
                free_s = self._begin(now_s)

    def _promised(self, now_s: float, size: Size, pace: Pace | None, ahead: Ahead) -> Ended:
        waiting = job(now_s, size=size, max_output_tokens=round(size.output_tokens))
        if pace is None:
            return waiting
        estimate_s = pace.estimate_s(size, ahead, 1, self.BATCH)
        return replace(waiting, estimate_s=estimate_s, p90_s=pace.eta(size, estimate_s).p90_s)

    def _begin(self, now_s: float) -> float:
        batch = [self.queue.popleft() for _ in range(min(self.BATCH, len(self.queue)))]
        lasts_s = self.STEP_S * max(each.size.output_tokens for each in batch)
        self.inside = [
            replace(
                each,
                started_s=now_s,
                ended_s=now_s + lasts_s,
                device_s=lasts_s / len(batch),
            )
            for each in batch
        ]
        return now_s + lasts_s


def test_on_bursty_traces_about_nine_of_ten_end_within_what_they_were_promised() -> None:
    kept, told_over_taken = [], []
    for seed in range(4):
        trace = Trace(seed, bursts=60)
        trace.play()
        promised = [each for each in trace.ended if each.p90_s is not None][100:]
        kept += [each.is_kept for each in promised]
        told_over_taken += [(each.p90_s or 0.0) / each.took_s for each in promised]

    assert 0.85 <= sum(kept) / len(kept) <= 0.97
    assert sorted(told_over_taken)[len(told_over_taken) // 2] < 2.0  # and says something
