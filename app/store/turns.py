"""Turns at the connections that a process keeps: in order, and not for ever.

To connect costs Postgres and whoever does it as much as a hundred small statements. So where all
are in use it is better to wait for a moment; but whoever waits for too long is not to be kept by a
statement that hangs, and goes on with a connection of his own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """As many at once as there are connections; each who leaves hands over to who came first."""

    def __init__(self, number: int, patience_s: float) -> None:
        self._patience_s = patience_s
        self._free = number
        self._lock = threading.Lock()
        self._line: deque[threading.Event] = deque()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within, it is one's turn, or has not been for the whole patience."""
        has_turn = self._take()
        try:
            yield
        finally:
            if has_turn:
                self._hand_over()

    def _take(self) -> bool:
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            mine = threading.Event()
            self._line.append(mine)
        if mine.wait(self._patience_s):
            return True
        with self._lock:
            if mine.is_set():  # only just now
                return True
            self._line.remove(mine)
            return False

    def _hand_over(self) -> None:
        with self._lock:
            if self._line:
                self._line.popleft().set()
            else:
                self._free += 1
