"""Settings against each other on one trace: latency against what the device works. Pure.

A setting is on the frontier if none that is as quick is cheaper. The grid finds where it runs, and
is made finer there, for both policies alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from app.config.settings import Policy
from app.tune.joined import replay_joined
from app.tune.replay import Arrival, Outcome, replay
from app.worker.batcher import Limits
from app.worker.policy import CostFit, StepCost

WAITS: Final = (0, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2.5, 4, 6, 10, 16)
"""Waits that are tried, in runs of a lone job."""
WAIT_COSTS: Final = (0.001, 0.01, 0.05)
ROUNDS: Final = 2
"""In which the grid is made finer beside the frontier."""
SHARE: Final = 0.95
"""Of the jobs, whose latency is what a setting is judged by."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What of a model's settings is tried."""

    max_batch_size: int
    max_wait_ms: float
    wait_cost: float | None = None  #: None is the fixed policy

    @property
    def policy(self) -> Policy:
        return Policy.FIXED if self.wait_cost is None else Policy.ADAPTIVE

    def limits(self, max_batch_tokens: int) -> Limits:
        wait_ns = int(self.max_wait_ms * 1e6)
        return Limits(self.max_batch_size, max_batch_tokens, wait_ns, self.wait_cost)


@dataclass(frozen=True, slots=True)
class Point:
    """A setting, and what the trace came to under it."""

    setting: Setting
    jobs: int
    batches: int
    mean_size: float
    largest: int  #: batch, in sequences
    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    device_s: float  #: that batches took, all together
    busy: float  #: of the time from the first arrival to the last answer

    @property
    def device_ms_per_job(self) -> float:
        return 1e3 * self.device_s / self.jobs

    def total_s(self, wait_cost: float) -> float:
        """Seconds of the device for a job, its waiting included at this price."""
        return (self.device_ms_per_job + wait_cost * self.mean_ms) / 1e3


class Bench:
    """Tries settings on one trace, each once."""

    def __init__(
        self,
        trace: Sequence[Arrival],
        cost: StepCost,
        max_batch_tokens: int,
        tried: Callable[[], object] = lambda: None,
        *,
        joins: bool = False,
    ) -> None:
        """`tried` is called after each. `joins`: sequences join between steps, which `cost` is of;
        then there is nothing to try but their number."""
        self._trace, self._cost, self._joins = trace, cost, joins
        self._max_batch_tokens, self._tried = max_batch_tokens, tried
        self.points: dict[Setting, Point] = {}

    def point(self, setting: Setting) -> Point:
        if setting not in self.points:
            outcome = self._run(setting)
            self.points[setting] = _point(setting, outcome)
            self._tried()
        return self.points[setting]

    def _run(self, setting: Setting) -> Outcome:
        if self._joins:
            return replay_joined(self._trace, setting.max_batch_size, self._cost)
        return replay(self._trace, setting.limits(self._max_batch_tokens), self._cost)

    def search(self, sizes: Sequence[int], current: Setting) -> None:
        """Try a grid of settings, and then, around the best of each policy, a finer one."""
        self.point(current)
        if self._joins:
            for size in sizes:
                self.point(replace(current, max_batch_size=size))
            return
        unit_ms = self._cost.of(1) / 1e6
        waits = sorted({round(share * unit_ms, 3) for share in WAITS} | {current.max_wait_ms})
        for wait_cost in (None, *WAIT_COSTS):
            some = sizes if wait_cost is None else [s for s in sizes if 2 * s >= max(sizes)]
            for wait_ms in waits:
                self._sizes(some, wait_ms, wait_cost)
        for _ in range(ROUNDS):
            for policy in Policy:
                self._refine(policy)

    def _sizes(self, sizes: Sequence[int], wait_ms: float, wait_cost: float | None) -> None:
        """Every size, from the largest on; one that no batch came up to changes nothing."""
        largest: int | None = None
        for size in sorted(sizes, reverse=True):
            if largest is None or size < largest:
                largest = self.point(Setting(size, wait_ms, wait_cost)).largest

    def _refine(self, policy: Policy) -> None:
        """Between the waits of the frontier and their neighbours."""
        for best in frontier(self.of(policy)):
            setting = best.setting
            waits = sorted(
                other.max_wait_ms
                for other in self.points
                if (other.max_batch_size, other.wait_cost)
                == (setting.max_batch_size, setting.wait_cost)
            )
            place = waits.index(setting.max_wait_ms)
            for beside in waits[max(0, place - 1) : place] + waits[place + 1 : place + 2]:
                middle = round((setting.max_wait_ms + beside) / 2, 3)
                if abs(middle - setting.max_wait_ms) > 0.01 * (middle + 1):
                    self.point(Setting(setting.max_batch_size, middle, setting.wait_cost))

    def of(self, policy: Policy) -> list[Point]:
        return [point for setting, point in self.points.items() if setting.policy is policy]


def _point(setting: Setting, outcome: Outcome) -> Point:
    return Point(
        setting,
        jobs=len(outcome.latencies_ns),
        batches=len(outcome.sizes),
        mean_size=sum(outcome.sizes) / len(outcome.sizes),
        largest=max(outcome.sizes),
        mean_ms=outcome.mean_latency_ns / 1e6,
        p50_ms=outcome.latency_ns(0.5) / 1e6,
        p95_ms=outcome.latency_ns(SHARE) / 1e6,
        p99_ms=outcome.latency_ns(0.99) / 1e6,
        device_s=outcome.device_ns / 1e9,
        busy=outcome.device_ns / max(1, outcome.ended_ns),
    )


def frontier(points: Iterable[Point]) -> list[Point]:
    """Those that none is quicker and cheaper than, the quickest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.p95_ms, p.device_s, p.mean_ms)):
        if not best or point.device_s < best[-1].device_s:
            best.append(point)
    return best


def cheapest(points: Iterable[Point], p95_ms: float) -> Point | None:
    """The one that takes the least of the device while it keeps this p95."""
    kept = [point for point in points if point.p95_ms <= p95_ms]
    return min(kept, key=lambda point: (point.device_s, point.mean_ms), default=None)


@dataclass(frozen=True, slots=True)
class Ratio:
    """The best adaptive setting over the best fixed one, where both keep a p95."""

    p95_ms: float
    fixed: Point
    adaptive: Point

    @property
    def device(self) -> float:
        return self.adaptive.device_s / self.fixed.device_s

    @property
    def mean_latency(self) -> float:
        return self.adaptive.mean_ms / self.fixed.mean_ms


def ratios(points: Sequence[Point], shares: Iterable[float]) -> list[Ratio]:
    """At p95s that are so many times the tightest that a fixed setting keeps."""
    by_policy = {
        policy: [point for point in points if point.setting.policy is policy] for policy in Policy
    }
    found: list[Ratio] = []
    if not all(by_policy.values()):
        return found
    tightest_ms = min(point.p95_ms for point in by_policy[Policy.FIXED])
    for share in shares:
        fixed = cheapest(by_policy[Policy.FIXED], share * tightest_ms)
        adaptive = cheapest(by_policy[Policy.ADAPTIVE], share * tightest_ms)
        if fixed and adaptive:
            found.append(Ratio(share * tightest_ms, fixed, adaptive))
    return found


def total_ratio(points: Sequence[Point], wait_cost: float) -> float:
    """The device and the waiting together: the best adaptive setting over the best fixed one."""
    least = {
        policy: min(p.total_s(wait_cost) for p in points if p.setting.policy is policy)
        for policy in Policy
    }
    return least[Policy.ADAPTIVE] / least[Policy.FIXED]


def fitted(batches: Sequence[tuple[float, float]]) -> tuple[StepCost, float] | None:
    """a + b·n from (sequences, ns) of batches, or of steps, and how far that is off on average, as
    a share of what they took; None without any that ran."""
    fit = CostFit(keep=1.0)
    good = [(rows, took_ns) for rows, took_ns in batches if rows > 0 and took_ns > 0]
    for rows, took_ns in good:
        fit.add(rows, took_ns)
    if (cost := fit.cost) is None:
        return None
    off = sum(abs(cost.of(rows) - took_ns) for rows, took_ns in good)
    return cost, off / sum(took_ns for _, took_ns in good)
