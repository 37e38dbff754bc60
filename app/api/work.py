"""What computes for submissions, in threads."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from typing import Final, ParamSpec, TypeVar

from app.api.threads import Threads
from app.errors import Busy

SMALL_BYTES: Final = 32_768
"""Longer bodies, and pieces of bodies, are large: they compute for milliseconds."""

LARGE_AT_ONCE: Final = 1 if len(os.sched_getaffinity(0)) < 4 else 2
"""Python computes in one thread at a time. What large ones would gain by taking turns in many of
them, all small ones and the event loop would lose. The text of one takes about 100 times its size
in memory while it is turned into tokens."""

SMALL_AT_ONCE: Final = 8

PATIENCE_S: Final = 10.0
"""How long a body waits for its turn."""

P = ParamSpec("P")
T = TypeVar("T")


class Work:
    """Submissions that are parsed, checked and turned into tokens: few at once, and small ones pass
    large ones by.

    A turn ends with its work, whatever becomes of the caller: memory and threads are in use until
    then. Belongs to the event loop's thread.
    """

    def __init__(self) -> None:
        self._small = asyncio.Semaphore(SMALL_AT_ONCE)
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._threads = Threads(SMALL_AT_ONCE + LARGE_AT_ONCE)

    async def run(
        self, num_bytes: int, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Do what takes so many bytes in a thread. Raises `Busy` if its turn does not come."""
        turns = self._large if num_bytes > SMALL_BYTES else self._small
        try:
            async with asyncio.timeout(PATIENCE_S):
                await turns.acquire()
        except TimeoutError:
            raise Busy("Too many large requests are being worked on. Try again.") from None
        work = self._threads.begin(partial(call, *args, **kwargs))
        work.add_done_callback(lambda _: turns.release())
        return await asyncio.shield(work)

    def close(self) -> None:
        self._threads.close()
