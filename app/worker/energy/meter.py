"""The meter: books a worker's energy on what its time went to, and bills it to attempts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from app.books.energy import (
    NJ_PER_J,
    EnergyMethod,
    Gauge,
    IdlePower,
    Paid,
    Taken,
    Unpaid,
    by_phase,
    sum_of,
)
from app.threads import Background
from app.worker.energy.source import Source
from app.worker.engine.hours import Hours
from app.worker.engine.page import Totals

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Joules:
    """All that was booked since the worker's start."""

    parts: Totals  #: nanojoules, by what they were used for
    num_estimated: int = 0  #: intervals whose energy is a guess
    num_absent: int = 0  #: intervals of whose energy nothing is known
    num_resets: int = 0  #: times that a counter began anew

    def __sub__(self, earlier: Joules) -> Joules:
        return Joules(
            self.parts - earlier.parts,
            self.num_estimated - earlier.num_estimated,
            self.num_absent - earlier.num_absent,
            self.num_resets - earlier.num_resets,
        )

    @property
    def method(self) -> EnergyMethod:
        """How all of it together is known."""
        if self.num_absent and not self.parts.up:
            return EnergyMethod.ABSENT
        is_guess = self.num_absent or self.num_estimated
        return EnergyMethod.ESTIMATED if is_guess else EnergyMethod.MEASURED


class EnergyMeter:
    """Owns what is booked, and what no attempt has paid yet. For any thread.

    The time since the last reading is booked at every reading, and whenever somebody asks. Only
    `read` asks the counters, which may take long; others go on from their last step.
    """

    def __init__(
        self, source: Source, hours: Hours, now_ns: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.source = source
        self._hours = hours
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._gauges = [Gauge(now_ns(), each.read(), each.wraps_at_nj) for each in source.counters]
        self._begin()

    def _begin(self) -> None:
        self._given = Totals()  #: time that is booked
        self._modelled_nj = 0  #: of all that time
        self._running_nj = 0  #: taken, of time that is not over yet: a step runs
        self._idle_power = IdlePower(None if self._gauges else self.source.model)
        self._booked = Joules(Totals())
        self._unpaid = Unpaid()

    def read(self) -> None:
        """Read the counters, and book what they say."""
        values = [counter.read() for counter in self.source.counters]
        with self._lock:
            self._book(values)

    def forsake_counters(self) -> None:
        """They turned out to be of another device: all time is booked anew, without them."""
        with self._lock:
            self.source = self.source.without_counters()
            self._gauges = []
            self._begin()

    def pay(self, device_ns: int, wasted_ns: int) -> Paid:
        """What an attempt that ended took; to be asked once for each."""
        with self._lock:
            if self._unpaid.ns <= device_ns + wasted_ns:  # else it is booked, as its batch is
                self._book([None] * len(self._gauges))
            return self._unpaid.pay(device_ns, wasted_ns)

    def joules(self) -> Joules:
        with self._lock:
            self._book([None] * len(self._gauges))
            return self._booked

    def facts(self) -> dict[str, object]:
        """For `celery inspect stats`: joules, by what they were used for."""
        told = self.joules()
        parts = {name: nj / NJ_PER_J for name, nj in asdict(told.parts).items()}
        return {
            "source": self.source.name,
            "boundary": self.source.boundary,
            "joules": parts,
            "resets": told.num_resets,
        }

    def _book(self, values: list[int | None]) -> None:
        look = self._hours.look()
        time_ns, self._given = _rise(self._given, look.given), look.given
        taken = self._take(values) if self._gauges else self._modelled()
        running_ns = look.open_ns if self._gauges else 0
        nj = self._running_nj + taken.nj
        if not (time_ns.up or running_ns):
            self._running_nj = nj if look.given.up else 0  # before the first process: nobody's
            return
        others = [time_ns.load, time_ns.busy, time_ns.waste, time_ns.overhead, running_ns]
        parts = by_phase(nj, time_ns.idle, others, self._idle_power.milliwatts)
        idle, load, busy, waste, overhead, self._running_nj = parts
        self._idle_power.learn(time_ns.idle, idle, is_pure=not any(others))
        self._unpaid.add(time_ns.busy + time_ns.waste, busy + waste, taken.method)
        if taken.was_reset:
            log.warning("An energy counter began anew.", extra={"action": "energy_reset"})
        before = self._booked
        self._booked = Joules(
            before.parts + Totals(load, busy, idle, waste, overhead),
            before.num_estimated + (taken.method is EnergyMethod.ESTIMATED),
            before.num_absent + (taken.method is EnergyMethod.ABSENT),
            before.num_resets + taken.was_reset,
        )

    def _take(self, values: list[int | None]) -> Taken:
        now_ns = self._now_ns()
        pairs = zip(self._gauges, values, strict=True)
        return sum_of([gauge.take(now_ns, value) for gauge, value in pairs])

    def _modelled(self) -> Taken:
        """By the model; of growing totals, so that no fraction is lost."""
        if self.source.model is None:
            return Taken(0, EnergyMethod.ABSENT)
        idle_ns = self._given.idle
        before_nj = self._modelled_nj
        self._modelled_nj = self.source.model.energy_nj(idle_ns, self._given.up - idle_ns)
        return Taken(self._modelled_nj - before_nj, EnergyMethod.ESTIMATED)


def _rise(before: Totals, now: Totals) -> Totals:
    pairs = zip(before.parts, now.parts, strict=True)
    return Totals(*(max(0, after - earlier) for earlier, after in pairs))


class EnergyWatch(Background):
    """Reads the meter again and again. What a driver does to it costs no job: without readings
    energy is an estimate."""

    def __init__(self, meter: EnergyMeter, reading_ms: int) -> None:
        self._stopping = threading.Event()
        super().__init__("energy", self._read, self._stopping, give_up=log.error)
        self._meter = meter
        self._reading_s = reading_ms / 1e3

    def _read(self) -> None:
        while not self._stopping.wait(self._reading_s):
            self._meter.read()

    def stop(self) -> None:
        self._stopping.set()
