"""Stores single submissions of a tenant that come at about the same time, in one transaction.

Whoever comes alone is stored at once. Where some came together, more do: these wait for each other
for a moment, or until a group is back. So a thousand take a few commits and messages, and not a
thousand.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from app.errors import QueueFull
from app.intake.submit import Stored
from app.store.submissions import NewJob

AT_ONCE: Final = 4
"""Groups that may be on their way: one that waits for a lock does not hold up the others."""
GATHER_S: Final = 0.01
"""From the beginning of a group with company to that of the next one."""
MOST_JOBS: Final = 100
"""Of one group: no submission waits for the writing of too many others."""

Write = Callable[[Sequence[NewJob]], Awaitable[Stored]]
Send = Callable[[Stored], Awaitable[None]]


class Writer:
    """Owner of the submissions that wait to be stored; belongs to the event loop's thread."""

    def __init__(self, write: Write, send: Send) -> None:
        """`write` stores some jobs in one transaction, and `send` sends their messages, for which
        no answer waits."""
        self._write = write
        self._send = send
        #: By tenant, whose turn is next first: a group is of one.
        self._waiting: dict[str, deque[tuple[NewJob, asyncio.Future[Stored]]]] = {}
        self._writing: set[asyncio.Task[None]] = set()
        self._gathers = False  #: one of them waits for company
        self._next_at = 0.0  #: by the loop's clock

    async def store(self, job: NewJob) -> Stored:
        """What became of it alone. Raises `QueueFull` and `Unavailable`, and then it is not
        stored.

        Whoever leaves meanwhile may have submitted it.
        """
        stored: asyncio.Future[Stored] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(job.tenant, deque()).append((job, stored))
        self._begin()
        return await stored

    def _begin(self) -> None:
        if self._waiting and len(self._writing) < AT_ONCE and not self._gathers:
            task = asyncio.create_task(self._work_off())
            self._writing.add(task)
            task.add_done_callback(self._writing.discard)

    async def _work_off(self) -> None:
        while self._waiting and not self._gathers:
            await self._gather()
            group = self._next_group()
            self._next_at = asyncio.get_running_loop().time() + GATHER_S if len(group) > 1 else 0.0
            self._begin()
            if stays := [each for each in group if not each[1].cancelled()]:
                await self._store(stays)

    def _next_group(self) -> list[tuple[NewJob, asyncio.Future[Stored]]]:
        tenant = next(iter(self._waiting))
        waiting = self._waiting.pop(tenant)
        group = [waiting.popleft() for _ in range(min(MOST_JOBS, len(waiting)))]
        if waiting:
            self._waiting[tenant] = waiting  # behind all others
        return group

    async def _gather(self) -> None:
        pause_s = self._next_at - asyncio.get_running_loop().time()
        if pause_s > 0:
            self._gathers = True
            try:
                await asyncio.sleep(pause_s)
            finally:
                self._gathers = False

    async def _store(self, group: Sequence[tuple[NewJob, asyncio.Future[Stored]]]) -> None:
        try:
            stored = await self._write([job for job, _ in group])
        except QueueFull as error:  # of all together: there may be room for some
            if len(group) > 1:
                for each in group:
                    await self._store([each])
            else:
                _end(group, error)
        except Exception as error:
            _end(group, error)
        else:
            for place, (_, future) in enumerate(group):
                if not future.cancelled():
                    future.set_result(stored.at_place(place))
            await self._send(stored)


def _end(group: Sequence[tuple[NewJob, asyncio.Future[Stored]]], error: Exception) -> None:
    for _, future in group:
        if not future.cancelled():
            future.set_exception(error)
