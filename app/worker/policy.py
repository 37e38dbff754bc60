"""The adaptive rule: when a batch that nobody can join later has waited long enough. Pure: the
caller brings the clock.

A batch of n sequences takes a + b·n of the device's time. Gathered at a rate of λ a second, each of
them costs, in seconds of the device, with w for what a second of its time is worth,

    a/n + b + w·((n - 1)/(2·λ) + b·n).

One more makes that less while n·(n + 1) < 2·a·λ / (w·(1 + 2·b·λ)): the rule of the economic order
quantity, with the length of the run in it. So long a batch waits. λ is that of the last arrivals,
and falls while nobody comes: a job that comes alone, or last, does not wait for company that is not
to be expected. a and b are fitted to the batches that ran; before the first has, nobody waits.

Two bounds are kept whatever λ, a and b are. All that company costs the oldest member, the wait and
b for each of its mates, is at most `max_wait_ns`: so where batches are long, less is waited. No
batch waits beyond the deadline of a member less the time that it will take. That a full one does
not wait at all is the batcher's own rule.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

WINDOW: Final = 16
"""Arrivals that the rate is taken from."""
GAPS: Final = 3
"""A silence of so many mean gaps is no chance (5 in 100, if arrivals are independent)."""
FORGET: Final = 1 - 1 / 32
"""What a batch still counts in a worker when the next has run."""
UNKNOWN: Final = 0.001
"""Weight of the assumption that half of a mean batch's time is fixed, beside the variance of sizes
over their mean squared: it decides where all batches have one size."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a batch takes of the device's time, in nanoseconds."""

    fixed_ns: float
    row_ns: float  #: for each sequence

    def of(self, rows: float) -> float:
        return self.fixed_ns + self.row_ns * rows


class CostFit:
    """Least squares of a + b·n over the batches that ran, later ones counting more."""

    def __init__(self, keep: float = FORGET) -> None:
        """`keep` is what a batch still counts when the next has run."""
        self._keep = keep
        self._weight = self._n = self._t = self._nn = self._nt = 0.0

    def add(self, rows: float, took_ns: float) -> None:
        """A batch of so many sequences has run; one that ran nothing says nothing."""
        if rows <= 0 or took_ns <= 0:
            return
        self._weight = self._weight * self._keep + 1
        self._n = self._n * self._keep + rows
        self._t = self._t * self._keep + took_ns
        self._nn = self._nn * self._keep + rows * rows
        self._nt = self._nt * self._keep + rows * took_ns

    @property
    def cost(self) -> StepCost | None:
        """None before the first batch has run. Neither part is negative."""
        if not self._weight:
            return None
        n, t = self._n / self._weight, self._t / self._weight
        variance = max(0.0, self._nn / self._weight - n * n)
        covariance = self._nt / self._weight - n * t
        slope = (covariance + UNKNOWN * n * t / 2) / (variance + UNKNOWN * n * n)
        row_ns = min(max(0.0, slope), t / n)
        return StepCost(t - row_ns * n, row_ns)


@dataclass(slots=True)
class Arrivals:
    """The last arrivals of a model."""

    _last: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, at_ns: int, rows: int) -> None:
        self._last.append((at_ns, rows))

    def slower_ns(self, rate: float) -> float:
        """When their rate will be below `rate` sequences a nanosecond, if nobody comes; it may have
        been below it before. As much as the window says, and no more than its silence allows."""
        if not self._last:
            return -math.inf
        first_ns, first_rows = min(self._last)
        rows = sum(rows for _, rows in self._last)
        silent = max(self._last)[0] + GAPS * rows / len(self._last) / rate
        return min(silent, first_ns + (rows - first_rows) / rate) if rows > first_rows else silent


def closes_ns(
    rows: int,
    oldest_ns: int,
    arrivals: Arrivals,
    cost: StepCost | None,
    *,
    max_wait_ns: int,
    wait_cost: float,
    deadlines_ns: Iterable[int] = (),
) -> int:
    """When a batch of `rows` sequences closes, if nobody comes: now, where that is over.

    `oldest_ns` is its oldest member's arrival, `wait_cost` the w of above.
    """
    if cost is None:
        return oldest_ns
    latest = oldest_ns + max(0.0, max_wait_ns - cost.row_ns * (rows - 1))
    due = min(deadlines_ns, default=math.inf) - cost.of(rows)
    return int(max(oldest_ns, min(latest, due, _worth_until_ns(rows, arrivals, cost, wait_cost))))


def _worth_until_ns(rows: int, arrivals: Arrivals, cost: StepCost, wait_cost: float) -> float:
    """Until when it pays to wait for one more: until arrivals are slower than the λ at which both
    sides of the rule are equal."""
    left = wait_cost * rows * (rows + 1)
    if (saved_ns := cost.fixed_ns - cost.row_ns * left) <= 0:
        return -math.inf
    return arrivals.slower_ns(left / (2 * saved_ns))
