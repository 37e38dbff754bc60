"""Who follows the streams of which jobs: one connection to Redis and one thread serve all.

The thread's connection waits for all streams that anybody here follows. What it reads of a job is
kept for a moment, once for all its listeners; one who is behind that, because it came later or
reads slowly, fetches what it is missing from Redis, a page at a time. So no listener holds more
than a page, however many there are and however slowly they read.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Final
from uuid import UUID

from app.api.threads import Threads
from app.broker.events import Entry, EventId, Reading, Started
from app.broker.streams import PAGE, Streams
from app.errors import Busy, Unavailable

READERS: Final = 2
"""Pages that are fetched from Redis at once."""
TURN_S: Final = 1.0
"""Longest wait of the reading thread for the event loop to take what it has read."""


@dataclass(slots=True)
class _Stream:
    """Of a job that somebody follows."""

    recent: deque[Entry] = field(default_factory=lambda: deque(maxlen=PAGE))
    wakes: list[asyncio.Event] = field(default_factory=list)  #: of its listeners


class Listeners:
    """Owner of the streams that are followed here. For the event loop's thread, but for `hear`."""

    def __init__(self, streams: Streams, most: int) -> None:
        self._streams = streams
        self._following = streams.follow()
        self._most = most
        self._threads = Threads(READERS)
        self._waker = Threads(1)
        self._is_waking = False  #: that is asked for, and has not begun
        self._loop: asyncio.AbstractEventLoop | None = None
        self._followed: dict[UUID, _Stream] = {}
        self.num_listening = 0

    def open(self) -> None:
        """Begin, on the running event loop."""
        self._loop = asyncio.get_running_loop()

    def hear(self, stop: threading.Event) -> None:
        """Read for all who listen, till `stop` is set; in a thread of its own."""
        assert self._loop is not None
        for heard in self._following.heard(stop):
            taken = threading.Event()
            self._loop.call_soon_threadsafe(self._tell, heard, taken)
            taken.wait(TURN_S)  # what comes meanwhile comes together

    def _tell(self, heard: Mapping[UUID, list[Entry]], taken: threading.Event) -> None:
        taken.set()
        for job_id, entries in heard.items():
            if (stream := self._followed.get(job_id)) is not None:
                stream.recent.extend(entries)
                for wake in stream.wakes:
                    wake.set()

    @contextmanager
    def listening(
        self, job_id: UUID, after: EventId | None, wake: asyncio.Event
    ) -> Iterator[Listener]:
        """Follow a job after an event; `wake` is set when there is more. Raises `Busy` if too many
        listen."""
        if self.num_listening >= self._most:
            raise Busy("Too many streams are held. Try again.")
        stream = self._followed.get(job_id)
        is_first = stream is None
        if stream is None:
            stream = self._followed[job_id] = _Stream()
            self._following.follow(job_id, after)
            self._wake()
        stream.wakes.append(wake)
        self.num_listening += 1
        try:
            page = partial(self._page, job_id)
            yield Listener(stream.recent, page, after, is_first=is_first)
        finally:
            self.num_listening -= 1
            stream.wakes.remove(wake)
            if not stream.wakes:
                del self._followed[job_id]
                self._following.leave(job_id)

    def _wake(self) -> None:
        """Have the thread's read begin anew, with all that are followed by then."""
        if not self._is_waking:
            self._is_waking = True
            self._waker.begin(self._wake_now)

    def _wake_now(self) -> None:
        self._is_waking = False  # whoever follows from now on has it done once more
        try:
            self._following.wake()
        except Unavailable:
            pass  # the thread finds out by itself

    async def _page(self, job_id: UUID, after: EventId | None) -> list[Entry]:
        return await self._threads.begin(partial(self._streams.read, job_id, after))

    async def forget(self, job_ids: Collection[UUID]) -> None:
        """Remove what was told of these jobs. Raises `Unavailable`."""
        await self._threads.begin(partial(self._streams.forget, job_ids))

    def close(self) -> None:
        self._threads.close()
        self._waker.close()


Page = Callable[[EventId | None], Awaitable[list[Entry]]]


class Listener:
    """One reader of one job's stream."""

    def __init__(
        self,
        recent: deque[Entry],
        page: Page,
        after: EventId | None,
        *,
        is_first: bool,
    ) -> None:
        """`recent` are the last events that were read of the stream; from `after` on if it
        `is_first` to listen."""
        self.reading = Reading(after)
        self._recent = recent
        self._page = page
        self.is_behind = not is_first
        """There may be more in Redis than is at hand."""

    async def news(self) -> list[Entry]:
        """What is new, a page at most; nothing if nothing is. Raises `Unavailable`."""
        while True:
            before, entries = self.reading.after, self._at_hand()
            told = await self.fetched() if entries is None else [*self.reading.take(entries)]
            if told or self.reading.after == before:
                return told

    async def fetched(self) -> list[Entry]:
        """One page of it from Redis itself."""
        entries = await self._page(self.reading.after)
        self.is_behind = len(entries) == PAGE
        return list(self.reading.take(entries or self._recent))

    def _at_hand(self) -> list[Entry] | None:
        """What is kept of what is new, or None if that is not all."""
        after = self.reading.after
        if self.is_behind:
            return None
        latest = takewhile(lambda each: after is None or each.id > after, reversed(self._recent))
        new = [*latest][::-1]
        if not new or isinstance(new[0].told, Started):
            return new
        return new if after is not None and new[0].id == after.next else None
