"""What readiness asks: whether something that is done for a submission can be done now."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from anyio import CapacityLimiter, to_thread

FRESH_S: Final = 1.0
"""However many ask, it is tried once in so long."""

PATIENCE_S: Final = 2.0
"""What takes longer counts as failed; a submission would wait as long."""


class Probe:
    """Tries something in a thread of its own; belongs to the event loop's thread."""

    def __init__(self, attempt: Callable[[], object]) -> None:
        self._attempt = attempt
        self._slot = CapacityLimiter(1)  # never waits behind requests, nor behind itself
        self._task: asyncio.Task[Exception | None] | None = None
        self._began_s = 0.0

    async def error(self) -> Exception | None:
        """What is wrong; None if nothing is."""
        is_over = self._task is None or self._task.done()
        if self._task is None or (is_over and time.monotonic() > self._began_s + FRESH_S):
            self._began_s = time.monotonic()
            self._task = asyncio.create_task(self._try())
        patience_s = self._began_s + PATIENCE_S - time.monotonic()
        await asyncio.wait({self._task}, timeout=max(0.0, patience_s))
        return self._task.result() if self._task.done() else TimeoutError()

    async def _try(self) -> Exception | None:
        try:
            await to_thread.run_sync(self._attempt, limiter=self._slot)
        except Exception as error:  # a bug, too, is a reason not to take jobs
            return error
        return None
