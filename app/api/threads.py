"""Calls that block or compute, in threads, of which no more are at work at once.

An answer of them reaches the event loop in one turn. In a storm each turn is long, and those that a
general library takes for each call add up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Threads:
    """Used from the event loop's thread."""

    def __init__(self, most: int) -> None:
        self._pool = ThreadPoolExecutor(most, thread_name_prefix="gristmill")

    def begin(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Do it as soon as a thread is free: first come, first served.

        Who cancels it is rid of it. It keeps its thread all the same until it ends, and does not
        begin if it has not by then.
        """
        loop = asyncio.get_running_loop()
        call_ends = loop.run_in_executor(self._pool, copy_context().run, call)
        call_ends.add_done_callback(_forget)
        return call_ends

    def close(self) -> None:
        """What has not begun does not begin."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _forget(call: asyncio.Future[Any]) -> None:
    """Whoever left does not ask how it ended."""
    if not call.cancelled():
        call.exception()


class Call(Generic[T]):
    """A call that blocks, in one of some threads, and that whoever waits for it may leave."""

    def __init__(self, call: Callable[[], T], threads: Threads) -> None:
        self._call = threads.begin(call)

    async def ends(self, within_s: float) -> bool:
        await asyncio.wait({self._call}, timeout=within_s)
        return self._call.done()

    def leave(self) -> None:
        self._call.cancel()

    def result(self) -> T:
        return self._call.result()
