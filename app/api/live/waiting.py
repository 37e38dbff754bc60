"""Long polls: who waits for which jobs, woken by Postgres' word that they are done.

Nobody holds a database connection or a thread while waiting. One listening thread serves all. A
notice is a hint to look again, and so is a new connection of the listener, since notices sent while
it was away are lost. A worker may die between a commit and the news of it: everybody also looks now
and then.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final, TypeVar
from uuid import UUID

Seen = TypeVar("Seen")

LOOK_AGAIN_S: Final = 5.0
"""Longest time between two looks, in case that a notice was lost."""

LATELY_S: Final = 3.0
"""For so long at least a notice is remembered: from one look of who follows many to the next."""

JOBS_OF_A_POLL: Final = 100
"""One that waits for more jobs than this counts as several."""


@dataclass(slots=True, eq=False)
class Watch:
    """One who waits: for all of some jobs to end, or for any of them."""

    for_all: bool
    missing: set[UUID]  #: jobs that had not ended when they were read, and no notice came of since
    noticed: set[UUID] = field(default_factory=set)  #: since the last look began
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def notice(self, job_id: UUID) -> None:
        self.noticed.add(job_id)
        self.missing.discard(job_id)
        if not (self.for_all and self.missing):
            self.wake.set()

    async def wakes(self, within_s: float) -> None:
        """Wait for that, or so long."""
        if within_s > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.wake.wait(), within_s)


class Waiters:
    """Owner of the events of all long polls. Its methods belong to the event loop's thread, but for
    `jobs_are_done` and `look_again`, which the listening thread calls."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watches: defaultdict[UUID, set[Watch]] = defaultdict(set)
        self._lately: set[UUID] = set()  #: jobs that notices came of
        self._before: set[UUID] = set()  #: and those of the time before
        self._turns_at = 0.0  #: by the monotonic clock, the one into the other
        self.is_closed = False
        self.num_waiting = 0

    def open(self) -> None:
        """Begin, on the running event loop."""
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """Let all who wait, now or later, answer at once with what there is."""
        self.is_closed = True
        self._wake_all()

    def jobs_are_done(self, job_ids: Collection[UUID]) -> None:
        """Results were committed."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._notice, job_ids)

    def look_again(self) -> None:
        """Notices may have been missed: everybody looks at their job once more."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._wake_all)

    async def until(
        self,
        read: Callable[[], Awaitable[Seen]],
        still_open: Callable[[Seen], Collection[UUID]],
        job_ids: Collection[UUID],
        timeout_s: float,
        *,
        for_all: bool = True,
        gather_s: float = 0.0,
    ) -> Seen:
        """What `read` saw of the jobs last: with none of those that are waited for `still_open`, or
        as they were when `timeout_s` had passed.

        Looks again when all that were open have ended; unless `for_all`, when any has. Before the
        first look it waits for `gather_s`, unless it hears sooner that all have ended.
        """
        give_up_at = time.monotonic() + timeout_s
        with self.watching(job_ids) as watch:
            watch.missing = watch.missing - self._lately - self._before
            if watch.missing and not self.is_closed:
                await watch.wakes(min(gather_s, timeout_s))
            watch.for_all = for_all
            while True:
                watch.wake.clear()  # before reading, so that what happens meanwhile is not missed
                watch.noticed.clear()
                seen = await read()
                missing = set(still_open(seen))
                remaining_s = give_up_at - time.monotonic()
                if not missing or remaining_s <= 0 or self.is_closed:
                    return seen
                watch.missing = missing - watch.noticed
                if not watch.missing:
                    continue
                await watch.wakes(min(remaining_s, LOOK_AGAIN_S))

    @contextmanager
    def watching(
        self, job_ids: Collection[UUID], *, for_all: bool = True, is_poll: bool = True
    ) -> Iterator[Watch]:
        """A watch whose `wake` is set at notices of these jobs, and when all are to look again. One
        that `is_poll` counts as one of those that are held."""
        watch = Watch(for_all, set(job_ids))
        weight = 1 + len(job_ids) // JOBS_OF_A_POLL if is_poll else 0
        for job_id in job_ids:
            self._watches[job_id].add(watch)
        self.num_waiting += weight
        try:
            yield watch
        finally:
            self.num_waiting -= weight
            for job_id in job_ids:
                self._watches[job_id].discard(watch)
                if not self._watches[job_id]:
                    del self._watches[job_id]

    def _notice(self, job_ids: Collection[UUID]) -> None:
        if (now := time.monotonic()) >= self._turns_at:
            self._before = self._lately if now < self._turns_at + LATELY_S else set()
            self._lately, self._turns_at = set(), now + LATELY_S
        self._lately.update(job_ids)
        for job_id in job_ids:
            for watch in self._watches.get(job_id, ()):
                watch.notice(job_id)

    def _wake_all(self) -> None:
        for watches in self._watches.values():
            for watch in watches:
                watch.wake.set()
