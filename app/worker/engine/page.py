"""The page of memory that a worker shares with its engine process: its progress, and its clock.

The clock says where the time goes, to the nanosecond. One stamp at every change closes the interval
before it, so that the parts add up to the time since the process was spawned. Stamps are
`time.monotonic_ns()`, one clock for both processes. The totals survive a kill: of two copies the
number of the last write says which one is whole.
"""

from __future__ import annotations

import enum
import mmap
import operator
import struct
from dataclasses import dataclass
from typing import Final

PROGRESS: Final = struct.Struct("=QQ")
"""Model steps taken since the models were loaded, and the slowest of late, in nanoseconds; native
unsigned integers."""

_NUMBER: Final = struct.Struct("=Q")
_COPY: Final = struct.Struct("=8Q")
PAGE_BYTES: Final = PROGRESS.size + _NUMBER.size + 2 * _COPY.size

Page = mmap.mmap | bytearray


class Phase(enum.IntEnum):
    """What goes on since the last stamp."""

    LOAD = 0
    IDLE = 1
    STEP = 2  #: from when there is something to run until a step of it is over


@dataclass(frozen=True, slots=True)
class Totals:
    """Nanoseconds, by what they were used for."""

    load: int = 0
    busy: int = 0  #: shared out to sequences, by steps that ended
    idle: int = 0
    waste: int = 0  #: steps that came to nothing
    overhead: int = 0  #: all else

    def __add__(self, other: Totals) -> Totals:
        return Totals(*map(operator.add, self.parts, other.parts))

    def __sub__(self, other: Totals) -> Totals:
        return Totals(*map(operator.sub, self.parts, other.parts))

    @property
    def parts(self) -> tuple[int, ...]:
        """In the order of the fields. Asked for with each job: `astuple` copies, and takes long."""
        return self.load, self.busy, self.idle, self.waste, self.overhead

    @property
    def up(self) -> int:
        return sum(self.parts)


@dataclass(slots=True)
class Clock:
    """What the page says; the process writes it, and the worker reads it."""

    stamp_ns: int
    phase: Phase = Phase.LOAD
    owed: int = 0  #: shared out, and not counted as busy yet
    load: int = 0
    busy: int = 0
    idle: int = 0
    waste: int = 0
    overhead: int = 0

    @property
    def given(self) -> int:
        """Shared out to sequences so far."""
        return self.busy + self.owed

    @property
    def totals(self) -> Totals:
        return Totals(self.load, self.busy, self.idle, self.waste, self.overhead)

    def turn(self, phase: Phase, now_ns: int, given: int = 0, *, in_vain: bool = False) -> int:
        """Close the interval, in which `given` was shared out; returns what came to nothing.

        What a device measured over the edge of an interval, because it computes on while the next
        step is prepared, is taken from the next ones. `in_vain`: the step did not end.
        """
        rest = max(0, now_ns - self.stamp_ns)
        self.owed += given
        paid = min(self.owed, rest)
        self.owed -= paid
        self.busy += paid
        rest -= paid
        wasted = 0
        match self.phase:
            case Phase.LOAD:
                self.load += rest
            case Phase.IDLE:
                self.idle += rest
            case Phase.STEP if in_vain:
                self.waste += rest
                wasted = rest
            case Phase.STEP:
                self.overhead += rest
        self.stamp_ns, self.phase = max(now_ns, self.stamp_ns), phase
        return wasted

    def show(self, page: Page) -> None:
        number = _NUMBER.unpack_from(page, PROGRESS.size)[0] + 1
        _COPY.pack_into(
            *(page, _place(number), self.stamp_ns, self.phase, self.owed),
            *(self.load, self.busy, self.idle, self.waste, self.overhead),
        )
        _NUMBER.pack_into(page, PROGRESS.size, number)


def shown(page: Page) -> Clock:
    """What was shown last."""
    while True:
        [number] = _NUMBER.unpack_from(page, PROGRESS.size)
        stamp_ns, phase, *rest = _COPY.unpack_from(page, _place(number))
        if _NUMBER.unpack_from(page, PROGRESS.size)[0] == number:
            return Clock(stamp_ns, Phase(phase), *rest)


def _place(number: int) -> int:
    return PROGRESS.size + _NUMBER.size + number % 2 * _COPY.size
