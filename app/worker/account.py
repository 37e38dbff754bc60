"""The account of this worker's time: what became of each nanosecond, window by window.

    engine's clock (Hours) ──▶ load, idle, overhead; and what was computed
    attempts that end      ──▶ busy (billed) and waste; what was computed for others is open

and beside it what became of each nanojoule (EnergyMeter), in the same parts.

A window is closed at each heartbeat, and has exactly what its attempts' rows say: every statement
that ends attempts names the window, and none is closed while the fate of such a statement is
unknown. So a worker that is killed is exact to its last window.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Final, NamedTuple
from uuid import UUID

from app.books.cost import device_cost
from app.books.energy import worst
from app.errors import GristmillError, Unavailable
from app.store import windows
from app.store.claims import Settled
from app.store.database import Database
from app.store.windows import Window
from app.worker.energy.meter import EnergyMeter, Joules
from app.worker.engine.hours import Hours
from app.worker.engine.page import Totals

log = logging.getLogger(__name__)

CLOSE_S: Final = 1.0
"""How long a heartbeat waits for a commit that is under way; else the next one closes."""


class Account:
    """Owns the open window and those that are not written yet. For any thread."""

    def __init__(
        self,
        worker_id: UUID,
        hours: Hours,
        energy: EnergyMeter,
        price: Decimal | None,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`price`: money for an hour of the device, if it has one."""
        self._worker_id = worker_id
        self._hours = hours
        self._energy = energy
        self._price = price
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._number = 1
        self._before = Totals()  #: at the end of the last window
        self._joules = Joules(Totals())  #: then
        self._open = Spent()  #: computed and not settled, then
        self._busy = self._waste = self._stray = Spent()  #: settled since
        self._billed = Decimal(0)  #: busy_ns at the device's price, attempt by attempt
        self._unsettled: set[UUID] = set()  #: attempts that are claimed
        self._in_doubt: set[UUID] = set()  #: of these, those of a statement of unknown fate
        self._writing = threading.Lock()
        self._unwritten: list[tuple[Window, int]] = []  #: each with when it was closed

    def opened(self, attempts: Iterable[UUID]) -> None:
        with self._lock:
            self._unsettled.update(attempts)

    @contextmanager
    def settling(self, spent: dict[UUID, Spent]) -> Iterator[Settling]:
        """Around a statement that ends attempts, which took so much each.

        It may be repeated, for more of them as well: each is booked once.
        """
        with self._lock:
            spent = {id_: each for id_, each in spent.items() if id_ in self._unsettled}
            self._in_doubt.update(spent)
            settling = Settling(self._number)
            try:
                yield settling
            except Unavailable:
                raise
            except BaseException:
                self._in_doubt.difference_update(spent)
                raise
            self._in_doubt.difference_update(spent)
            self._unsettled.difference_update(spent)
            rows = [row for row in settling.rows if row.attempt_id in spent]
            self._book(rows, sum(spent.values(), Spent()))

    def refused(self, attempt_id: UUID, spent: Spent) -> None:
        """The row of an attempt takes no end: what it took is told by none."""
        with self._lock:
            self._unsettled.discard(attempt_id)
            self._book((), spent)

    def _book(self, rows: Collection[Settled], spent: Spent) -> None:
        busy = Spent(sum(row.device_ns for row in rows), sum(row.energy_nj for row in rows))
        waste = Spent(sum(row.wasted_ns for row in rows), sum(row.wasted_nj for row in rows))
        stray = spent - busy - waste
        self._busy += busy
        self._waste += waste + stray
        self._stray += stray
        if self._price is not None:
            self._billed += sum(device_cost(row.device_ns, self._price) for row in rows)

    def close(self, *, is_last: bool = False) -> None:
        """End the open window and begin the next one; not now, if a commit's fate is unknown.

        `is_last`: the worker ends. With attempts that were left to rescue it is not the last.
        """
        if not self._lock.acquire(timeout=CLOSE_S):
            return
        try:
            if self._in_doubt:
                return
            look, joules = self._hours.look(), self._energy.joules()
            totals = look.totals
            time_ns, energy = totals - self._before, joules - self._joules
            computed = Spent(time_ns.busy + time_ns.waste, energy.parts.busy + energy.parts.waste)
            open_ = self._open + computed - self._busy - self._waste
            is_last = is_last and not self._unsettled
            if is_last:  # nobody is left to be told of it
                stray = Spent(max(0, open_.ns + look.owed_ns), open_.nj)
                self._book((), stray)
                open_ -= stray
            rise = open_ - self._open
            window = self._window(time_ns, energy, rise, look.owed_ns, is_last=is_last)
            with self._writing:
                self._unwritten.append((window, self._now_ns()))
            self._before, self._joules, self._open = totals, joules, open_
            self._number += 1
            self._busy = self._waste = self._stray = Spent()
            self._billed = Decimal(0)
        finally:
            self._lock.release()

    def _window(
        self, time_ns: Totals, energy: Joules, open_: Spent, owed_ns: int, *, is_last: bool
    ) -> Window:
        rounding = None
        if self._price is not None:
            parts = (time_ns.load, time_ns.idle, self._waste.ns, time_ns.overhead, open_.ns)
            costs = (device_cost(part, self._price) for part in parts)
            rounding = device_cost(time_ns.up, self._price) - sum(costs, self._billed)
        return Window(
            worker_id=self._worker_id,
            number=self._number,
            up_ns=time_ns.up,
            load_ns=time_ns.load,
            busy_ns=self._busy.ns,
            idle_ns=time_ns.idle,
            waste_ns=self._waste.ns,
            overhead_ns=time_ns.overhead,
            open_ns=open_.ns,
            stray_ns=self._stray.ns,
            owed_ns=owed_ns,
            energy_nj=energy.parts.up,
            load_nj=energy.parts.load,
            busy_nj=self._busy.nj,
            idle_nj=energy.parts.idle,
            waste_nj=self._waste.nj,
            overhead_nj=energy.parts.overhead,
            open_nj=open_.nj,
            stray_nj=self._stray.nj,
            energy_method=worst((self._energy.source.method, energy.method)),
            energy_boundary=self._energy.source.boundary,
            counter_resets=energy.num_resets,
            is_last=is_last,
            rounding=rounding,
        )

    def write(self, database: Database) -> None:
        """Write what is closed; raises `Unavailable` with nothing lost."""
        with self._writing:
            while self._unwritten:
                window, closed_ns = self._unwritten[0]
                try:
                    with database.autocommit() as connection:
                        windows.write(connection, window, (self._now_ns() - closed_ns) / 1e9)
                except Unavailable:
                    raise
                except GristmillError as error:  # the audit will say that it is not there
                    log.error("A window was refused: %s", error, extra={"action": "window_refused"})
                del self._unwritten[0]


class Spent(NamedTuple):
    """Device time and its energy."""

    ns: int = 0
    nj: int = 0

    def __add__(self, other: Spent) -> Spent:  # type: ignore[override]
        return Spent(self.ns + other.ns, self.nj + other.nj)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.ns - other.ns, self.nj - other.nj)


class Settling:
    """A statement that ends attempts: in which window, and what came of it."""

    def __init__(self, window_number: int) -> None:
        self.window_number = window_number
        self.rows: Collection[Settled] = ()  #: what now stands in rows of attempts
