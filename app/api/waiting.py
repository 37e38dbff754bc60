"""Long polls: who waits for which job, woken by Postgres' word that it is done.

Nobody holds a database connection or a thread while waiting. One listening thread serves all. A
notice is a hint to look again, and so is a new connection of the listener, since notices sent while
it was away are lost.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from uuid import UUID

Seen = TypeVar("Seen")


class Waiters:
    """Owner of the events of all long polls. Its methods belong to the event loop's thread, but for
    `job_is_done` and `look_again`, which the listening thread calls."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._events: defaultdict[UUID, set[asyncio.Event]] = defaultdict(set)
        self._is_closed = False
        self.num_waiting = 0

    def open(self) -> None:
        """Begin, on the running event loop."""
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """Let all who wait, now or later, answer at once with what there is."""
        self._is_closed = True
        self._wake_all()

    def job_is_done(self, job_id: UUID) -> None:
        """A result was committed."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._wake, job_id)

    def look_again(self) -> None:
        """Notices may have been missed: everybody looks at their job once more."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._wake_all)

    async def until(
        self,
        is_done: Callable[[Seen], bool],
        read: Callable[[], Awaitable[Seen]],
        job_id: UUID,
        timeout_s: float,
    ) -> Seen:
        """What `read` saw of the job last: done, or as it was when `timeout_s` had passed."""
        give_up_at = time.monotonic() + timeout_s
        with self._event_of(job_id) as event:
            while True:
                event.clear()  # before reading, so that what happens meanwhile is not missed
                seen = await read()
                remaining_s = give_up_at - time.monotonic()
                if is_done(seen) or remaining_s <= 0 or self._is_closed:
                    return seen
                try:
                    await asyncio.wait_for(event.wait(), remaining_s)
                except TimeoutError:
                    continue  # one last look: the listener may have been away

    @contextmanager
    def _event_of(self, job_id: UUID) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        self._events[job_id].add(event)
        self.num_waiting += 1
        try:
            yield event
        finally:
            self.num_waiting -= 1
            self._events[job_id].discard(event)
            if not self._events[job_id]:
                del self._events[job_id]

    def _wake(self, job_id: UUID) -> None:
        for event in self._events.get(job_id, ()):
            event.set()

    def _wake_all(self) -> None:
        for job_id in self._events:
            self._wake(job_id)
