"""What is asked again and again, by readiness and by Prometheus: looked at once in a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from app.api.threads import Threads
from app.errors import Unavailable

FRESH_S: Final = 1.0
"""However many ask, it is looked at once in so long."""

PATIENCE_S: Final = 2.0
"""What takes longer counts as failed; a submission would wait as long."""

T = TypeVar("T")


class Probe(Generic[T]):
    """Looks in a thread of its own, for all who ask; belongs to the event loop's thread."""

    def __init__(self, look: Callable[[], T], patience_s: float = PATIENCE_S) -> None:
        self._look = look
        self._patience_s = patience_s
        self._threads = Threads(1)  # never waits behind requests, nor behind itself
        self._latest: asyncio.Future[T] | None = None
        self._began_s = 0.0
        # Wakes one in each turn of the loop: none keeps others waiting.
        self._line = asyncio.Lock()

    async def found(self) -> T:
        """What the latest look found; raises what kept it from that."""
        async with self._line:
            latest = self.begin()
            if not latest.done():
                patience_s = self._began_s + self._patience_s - time.monotonic()
                await asyncio.wait({latest}, timeout=max(0.0, patience_s))
        if not latest.done():
            raise Unavailable("No answer in time.")
        return latest.result()

    def begin(self) -> asyncio.Future[T]:
        """The latest look, which begins now if there is none or it is old."""
        is_over = self._latest is None or self._latest.done()
        if self._latest is None or (is_over and time.monotonic() > self._began_s + FRESH_S):
            self._began_s = time.monotonic()
            self._latest = self._threads.begin(self._look)
        return self._latest

    async def error(self) -> Exception | None:
        """What is wrong; None if nothing is. A bug, too, is a reason not to take jobs."""
        try:
            await self.found()
        except Exception as error:
            return error
        return None

    def close(self) -> None:
        self._threads.close()
