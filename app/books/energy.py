"""Joules: what a counter says of an interval, what of it each phase took, and who pays. Pure.

    counter ──Gauge──▶ nanojoules of an interval ──by_phase──▶ phases ──Unpaid──▶ attempts

Everything is in whole nanojoules, so that sums are exact. One nanojoule in a nanosecond is a watt.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from app.books.shares import share

NJ_PER_MJ: Final = 1_000_000
NJ_PER_UJ: Final = 1_000
NJ_PER_J: Final = 1_000_000_000
NJ_PER_KWH: Final = 3_600_000 * NJ_PER_J
UG_PER_G: Final = 1_000_000

STALE_NS: Final = 2_000_000_000
"""A counter that does not move for so long is not believed: what follows is an estimate."""
MOST_WATTS: Final = 20_000
"""No counter rises faster; one that seems to has started anew, or is broken."""
SECOND_NS: Final = 1_000_000_000


class EnergyMethod(enum.StrEnum):
    """How the energy on a record is known."""

    MEASURED = "measured"  #: by a counter
    ESTIMATED = "estimated"  #: by power times time, in part at least
    ABSENT = "absent"  #: not at all


_WORSE: Final = (EnergyMethod.MEASURED, EnergyMethod.ESTIMATED, EnergyMethod.ABSENT)


def worst(methods: Iterable[EnergyMethod]) -> EnergyMethod:
    """What a sum of such parts is: as good as its worst part."""
    return max(methods, key=_WORSE.index, default=EnergyMethod.ABSENT)


@dataclass(frozen=True, slots=True)
class Taken:
    """The energy of one interval."""

    nj: int
    method: EnergyMethod
    was_reset: bool = False  #: the counter began anew, or jumped


def sum_of(parts: Sequence[Taken]) -> Taken:
    """Of several counters over one interval; known as well as the worst of them."""
    return Taken(
        sum(part.nj for part in parts),
        worst(part.method for part in parts),
        any(part.was_reset for part in parts),
    )


class Gauge:
    """Energy between any two moments, of a counter that moves in steps and may start anew.

    Between two steps the power of the last one goes on: that much is taken ahead, and the next
    step pays it back. So an interval that is shorter than a step has its energy, the sum follows
    the counter, and nothing is ever negative. Over a reset, too, the power goes on.
    """

    def __init__(self, now_ns: int, counter_nj: int | None, wraps_at_nj: int | None = None) -> None:
        """`wraps_at_nj`: where the counter goes back to 0, if it does."""
        self._wraps_at_nj = wraps_at_nj
        self._counter_nj = counter_nj
        self._moved_ns = self._taken_ns = now_ns  #: last step of the counter; end of the last take
        self._ahead_nj = 0
        self._power: Fraction | None = None  #: of the last step, in watts

    def take(self, now_ns: int, counter_nj: int | None) -> Taken:
        """The energy since the last call. `counter_nj` is None where it cannot be read now."""
        elapsed_ns = max(0, now_ns - self._taken_ns)
        self._taken_ns += elapsed_ns
        since_ns = self._taken_ns - self._moved_ns
        if counter_nj is None or counter_nj == self._counter_nj:
            ahead_nj = int((self._power or 0) * elapsed_ns)
            self._ahead_nj += ahead_nj
            return Taken(ahead_nj, self._believed(since_ns))
        before_nj, self._counter_nj, self._moved_ns = self._counter_nj, counter_nj, self._taken_ns
        ahead_nj, self._ahead_nj = self._ahead_nj, 0
        rise_nj = None if before_nj is None else self._rise(before_nj, counter_nj, since_ns)
        if rise_nj is None:
            gap_nj = max(0, int((self._power or 0) * since_ns) - ahead_nj)
            return Taken(gap_nj, self._guessed, was_reset=before_nj is not None)
        if since_ns > 0:
            self._power = min(Fraction(rise_nj, since_ns), Fraction(MOST_WATTS))
        if since_ns <= STALE_NS:  # older guesses stand: they are not taken back for minutes to come
            self._ahead_nj = max(0, ahead_nj - rise_nj)
        return Taken(max(0, rise_nj - ahead_nj), EnergyMethod.MEASURED)

    @property
    def _guessed(self) -> EnergyMethod:
        return EnergyMethod.ABSENT if self._power is None else EnergyMethod.ESTIMATED

    def _believed(self, since_ns: int) -> EnergyMethod:
        return EnergyMethod.MEASURED if since_ns <= STALE_NS else self._guessed

    def _rise(self, before_nj: int, after_nj: int, since_ns: int) -> int | None:
        """None if this is no rise that a device can have caused."""
        rise_nj = after_nj - before_nj
        if rise_nj < 0 and self._wraps_at_nj is not None:
            rise_nj += self._wraps_at_nj
        return rise_nj if 0 <= rise_nj <= MOST_WATTS * (since_ns + SECOND_NS) else None


@dataclass(frozen=True, slots=True)
class PowerModel:
    """Watts of a device that has no counter, in milliwatts."""

    idle_mw: int
    busy_mw: int

    def energy_nj(self, idle_ns: int, other_ns: int) -> int:
        """Rounded down: of growing totals it is taken, so that no fraction is lost."""
        return (self.idle_mw * idle_ns + self.busy_mw * other_ns) // 1_000


class IdlePower:
    """What idle time draws: as the last second with nothing to do drew, or by the model."""

    def __init__(self, model: PowerModel | None) -> None:
        self._is_set = model is not None
        self.milliwatts = model.idle_mw if model else None  #: None while it is not known
        self._ns = self._nj = 0  #: since there was something to do

    def learn(self, idle_ns: int, idle_nj: int, *, is_pure: bool) -> None:
        """From an interval; `is_pure`: the device did nothing else in it."""
        if self._is_set:
            return
        self._ns, self._nj = (self._ns + idle_ns, self._nj + idle_nj) if is_pure else (0, 0)
        if self._ns >= SECOND_NS:
            self.milliwatts, self._ns, self._nj = self._nj * 1_000 // self._ns, 0, 0


def by_phase(nj: int, idle_ns: int, others_ns: Sequence[int], idle_mw: int | None) -> list[int]:
    """Split an interval's energy over its phases; the first part is the idle time's.

    Idle time takes its own power, `idle_mw`, as far as there is energy; all else is shared by
    time. Where that power is not known, idle time shares by time as well. Raises `ValueError` if
    there is energy and no time.
    """
    if idle_mw is None or not any(others_ns):
        return share(nj, [idle_ns, *others_ns])
    idle_nj = min(nj, idle_mw * idle_ns // 1_000)
    return [idle_nj, *share(nj - idle_nj, others_ns)]


@dataclass(frozen=True, slots=True)
class Paid:
    """What an attempt took."""

    energy_nj: int | None  #: of its answer; None where nothing is known
    wasted_nj: int | None  #: without an answer
    method: EnergyMethod

    @property
    def spent_nj(self) -> int | None:
        """All of it: what is wasted of an attempt that brings no answer after all."""
        if self.energy_nj is None or self.wasted_nj is None:
            return None
        return self.energy_nj + self.wasted_nj


NOTHING_KNOWN: Final = Paid(None, None, EnergyMethod.ABSENT)


class Unpaid:
    """Device time that was shared out and is on no attempt's record yet, with its energy.

    An attempt that ends pays for its time at the mean power of all that is unpaid, rounded down;
    who pays for the last nanosecond pays the last nanojoule. So what attempts pay adds up.
    """

    def __init__(self) -> None:
        self.ns = 0
        self.nj = 0
        self._doubtful_ns = {EnergyMethod.ESTIMATED: 0, EnergyMethod.ABSENT: 0}

    def add(self, ns: int, nj: int, method: EnergyMethod) -> None:
        """More was shared out. If its energy is a guess, so is that of all time that waits."""
        self.ns += ns
        self.nj += nj
        if method in self._doubtful_ns and ns:
            self._doubtful_ns[method] = self.ns

    def pay(self, device_ns: int, wasted_ns: int) -> Paid:
        """For an attempt that ended; it counts only once."""
        time_ns = min(device_ns + wasted_ns, self.ns)
        total_nj = self.nj * time_ns // self.ns if self.ns else 0
        method = worst((EnergyMethod.MEASURED, *(of for of, ns in self._doubtful_ns.items() if ns)))
        self.ns -= time_ns
        self.nj -= total_nj
        for of, ns in self._doubtful_ns.items():
            self._doubtful_ns[of] = max(0, ns - time_ns)
        if method is EnergyMethod.ABSENT:
            if not total_nj:
                return NOTHING_KNOWN
            method = EnergyMethod.ESTIMATED
        energy_nj, wasted_nj = share(total_nj, [device_ns, wasted_ns])
        return Paid(energy_nj, wasted_nj, method)


def carbon_ug(energy_nj: int, grams_per_kwh: Fraction) -> int:
    """Micrograms of CO2-equivalent, to the nearest; halves up."""
    exact = energy_nj * grams_per_kwh * UG_PER_G / NJ_PER_KWH
    return int(exact + Fraction(1, 2))
