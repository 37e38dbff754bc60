"""Where the time of all engine processes of a worker goes, one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from app.worker.engine.page import Clock, Page, Phase, Totals, shown


@dataclass(frozen=True, slots=True)
class Look:
    """All processes' time until now."""

    totals: Totals
    owed_ns: int = 0  #: shared out, and not counted as busy yet
    open_ns: int = 0  #: that the totals do not have yet: a step that runs, or no process there

    @property
    def given(self) -> Totals:
        """The totals, with all that was shared out as busy time."""
        return replace(self.totals, busy=self.totals.busy + self.owed_ns)


class Hours:
    """Reads the clock of each process, and goes on where one was killed. For any thread.

    From its last stamp on a step that runs is not counted before it has ended: `read` is as of that
    stamp. Loading and idling are counted as they last.
    """

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self._now_ns = now_ns
        self._lock = threading.Lock()
        self._past = Totals()  #: of processes that have ended
        self._ended_ns: int | None = None
        self._page: Page | None = None
        self.owed_ns = 0  #: that the process before this one gave, and had no time left to pay
        self.spent_ns = 0  #: by all that was ever inside the last process that ended

    def begin(self, page: Page) -> None:
        """A process is spawned; from the end of the one before it on nothing was done."""
        with self._lock:
            now_ns = self._now_ns()
            if self._ended_ns is not None:
                self._past += Totals(overhead=now_ns - self._ended_ns)
            Clock(now_ns, owed=self.owed_ns).show(page)
            self._page = page

    def end(self, *, was_busy: bool) -> None:
        """The process is dead; `was_busy`: with sequences inside, so that its last step is waste
        and not overhead."""
        with self._lock:
            if self._page is None:
                return
            clock = shown(self._page)
            self._ended_ns = self._now_ns()
            clock.turn(clock.phase, self._ended_ns, in_vain=was_busy)
            self.spent_ns = clock.given - self.owed_ns + clock.waste
            self.owed_ns = clock.owed
            self._past += clock.totals
            self._page = None

    def read(self) -> Totals:
        """Since the first process was spawned."""
        return self.look().totals

    def look(self) -> Look:
        with self._lock:
            now_ns = self._now_ns()
            if self._page is None:
                since_ns = self._ended_ns if self._ended_ns is not None else now_ns
                return Look(self._past, self.owed_ns, now_ns - since_ns)
            clock = shown(self._page)
            if clock.phase is not Phase.STEP:
                clock.turn(clock.phase, now_ns)
            return Look(self._past + clock.totals, clock.owed, max(0, now_ns - clock.stamp_ns))
