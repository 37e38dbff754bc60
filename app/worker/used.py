"""Tells the broker what jobs took of the device, so that tenants take turns by that.

A thread of its own: Redis may be slow or away, and the runner never waits for it. What cannot be
told is told later, and forgotten if this process ends: then its tenants were charged as estimated.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Final

from app.broker.lanes import Used
from app.errors import Unavailable
from app.threads import Background

PAUSE_S: Final = 0.5
"""From the first job that ended to the telling of all that ended meanwhile."""
MAX_PAUSE_S: Final = 5.0
"""Longest pause while Redis is away: a frozen one keeps each connection that was tried."""

Whose = tuple[str, int, str]
"""Model, priority and tenant."""


class UsedTeller:
    """Sums up what is noted, by any thread, and tells it."""

    def __init__(self, tell: Callable[[Mapping[Whose, Used]], object]) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._used: dict[Whose, Used] = {}
        self._has_some = threading.Event()
        self._stopping = threading.Event()
        self._thread = Background("used", self._run, self._stopping)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._has_some.set()

    def note(self, whose: Whose, used: Used) -> None:
        with self._lock:
            self._used[whose] = self._used.get(whose, Used()) + used
        self._has_some.set()

    def _run(self) -> None:
        pause_s = PAUSE_S
        while not self._stopping.is_set():
            self._has_some.wait()
            self._stopping.wait(pause_s)
            self._has_some.clear()
            pause_s = PAUSE_S if self._tell_all() else min(2 * pause_s, MAX_PAUSE_S)

    def _tell_all(self) -> bool:
        with self._lock:
            used, self._used = self._used, {}
        try:
            if used:
                self._tell(used)
        except Unavailable:
            for whose, each in used.items():
                self.note(whose, each)
            return False
        return True
