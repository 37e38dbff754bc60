"""What is asked again and again, by readiness and by Prometheus: looked at once in a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from anyio import CapacityLimiter, to_thread

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
        self._slot = CapacityLimiter(1)  # never waits behind requests, nor behind itself
        self._task: asyncio.Task[T | Exception] | None = None
        self._began_s = 0.0
        self._line = (
            asyncio.Lock()
        )  #: wakes one in each turn of the loop: none keeps others waiting

    async def found(self) -> T:
        """What the latest look found; raises what kept it from that."""
        async with self._line:
            task = self.begin()
            if not task.done():
                patience_s = self._began_s + self._patience_s - time.monotonic()
                await asyncio.wait({task}, timeout=max(0.0, patience_s))
        if not task.done():
            raise Unavailable("No answer in time.")
        if isinstance(found := task.result(), Exception):
            raise found
        return found

    def begin(self) -> asyncio.Task[T | Exception]:
        """The latest look, which begins now if there is none or it is old."""
        is_over = self._task is None or self._task.done()
        if self._task is None or (is_over and time.monotonic() > self._began_s + FRESH_S):
            self._began_s = time.monotonic()
            self._task = asyncio.create_task(self._try())
        return self._task

    async def error(self) -> Exception | None:
        """What is wrong; None if nothing is."""
        try:
            await self.found()
        except Exception as error:
            return error
        return None

    async def _try(self) -> T | Exception:
        try:
            return await to_thread.run_sync(self._look, limiter=self._slot)
        except Exception as error:  # a bug, too, is a reason not to take jobs
            return error
