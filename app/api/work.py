"""What blocks or computes, in threads: each keeps its thread until it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Generic, ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread

from app.errors import Busy

BODIES: Final = 2
"""As many of the largest bodies are worked on at once. Turning text into tokens takes about 100
times its size in memory."""

THREADS: Final = 8
"""Whatever their size, no more bodies are worked on at once than these threads take."""

PATIENCE_S: Final = 10.0
"""How long a body waits for its turn."""

P = ParamSpec("P")
T = TypeVar("T")


class Call(Generic[T]):
    """A call that blocks, in one of some threads.

    Whoever waits for it may leave. It keeps its thread all the same until it ends, so that there
    are never more at work than there are threads; it does not begin if it has not by then.
    """

    def __init__(self, call: Callable[[], T], threads: CapacityLimiter | None = None) -> None:
        self._call = call
        self._has_begun = False
        self._task = asyncio.create_task(to_thread.run_sync(self._run, limiter=threads))
        self._task.add_done_callback(_forget)

    async def ends(self, within_s: float) -> bool:
        await asyncio.wait({self._task}, timeout=within_s)
        return self._task.done()

    def leave(self) -> None:
        if not self._has_begun:
            self._task.cancel()

    def result(self) -> T:
        return self._task.result()

    def _run(self) -> T:
        self._has_begun = True
        return self._call()


def _forget(task: asyncio.Task[Any]) -> None:
    """Whoever left does not ask how it ended."""
    if not task.cancelled():
        task.exception()


class Work:
    """Bounds the bytes of submissions that are parsed, checked and turned into tokens at once.

    What has room does not wait for what has none. A turn ends with its work, whatever becomes of
    the caller: memory and threads are in use until then. Belongs to the event loop's thread.
    """

    def __init__(self, max_body_bytes: int) -> None:
        self._max = self._free = BODIES * max_body_bytes
        self._changed = asyncio.Condition()
        self._threads = CapacityLimiter(THREADS)
        self._under_way: set[asyncio.Task[Any] | None] = set()

    async def run(
        self, num_bytes: int, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Do what takes so many bytes in a thread. Raises `Busy` if its turn does not come."""
        num_bytes = min(num_bytes, self._max)
        try:
            async with asyncio.timeout(PATIENCE_S), self._changed:
                await self._changed.wait_for(lambda: self._has_room(num_bytes))
                self._free -= num_bytes
        except TimeoutError:
            raise Busy("Too many large requests are being worked on. Try again.") from None
        work = asyncio.create_task(self._do(num_bytes, partial(call, *args, **kwargs)))
        self._under_way.add(work)
        return await asyncio.shield(work)

    def _has_room(self, num_bytes: int) -> bool:
        return num_bytes <= self._free and len(self._under_way) < THREADS

    async def _do(self, num_bytes: int, call: Callable[[], T]) -> T:
        try:
            return await to_thread.run_sync(call, limiter=self._threads)
        finally:
            self._free += num_bytes
            self._under_way.remove(asyncio.current_task())
            async with self._changed:
                self._changed.notify_all()
