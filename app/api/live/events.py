"""A job's events, for every door: where it waits, when it begins, its tokens, its end.

    queued ─▶ started ─▶ tokens … ─▶ ended
       ▲         │  ▲
       └─────────┘  └── again, as often as it is begun anew: what was told of tokens before is void

Tokens come from the job's stream in Redis, if it was submitted with `stream_events`; all else from
its row. The row is the truth: it ends the events whatever became of the stream, and its result
is whole.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Final
from uuid import UUID

from app.api.live.followers import Listener
from app.api.live.waiting import Waiters, Watch
from app.api.reader import Snapshot
from app.api.schemas import Eta
from app.api.services import Services
from app.broker import events as told
from app.broker.events import Entry, EventId
from app.errors import RequestError, Unavailable
from app.jobs import JobState

LOOK_S: Final = 5.0
"""Pause between two looks at the row, if nothing asks for one."""
KEEP_ALIVE_S: Final = 10.0
"""Longest silence: proxies close connections that say nothing for half a minute or so."""
REST_S: Final = 0.25
REST_LOOK_S: Final = 0.02
"""How long, and how often, the last tokens of a job that has ended are looked for: they take
another way than its result."""


@dataclass(frozen=True, slots=True)
class Queued:
    """It waits: the first event of such a job, and again whenever its place has changed."""

    position: int | None  #: 1 for the next one of its model; None while it is not due
    eta: Eta | None


@dataclass(frozen=True, slots=True)
class Begun:
    """The engine has begun it. Tokens that were told before are void."""

    id: EventId
    batch_id: UUID
    batch_size: int  #: jobs that were claimed together

    @property
    def is_restart(self) -> bool:
        """Whether it had been begun before."""
        return self.id != EventId(1, 0)


@dataclass(frozen=True, slots=True)
class NewTokens:
    """New of one of its answers. The texts of an `index` since `Begun` together are its text."""

    id: EventId
    index: int  #: of the sequence: that of its choice
    text: str  #: whole characters, and nothing that a stop string may begin with
    tokens: told.Tokens  #: with the ids, and their log-probabilities where those were asked for


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing has happened for `KEEP_ALIVE_S` but that its place has changed; and the first event
    of a job that runs."""


@dataclass(frozen=True, slots=True)
class Ended:
    """It is final: the last event."""

    job: Snapshot  #: with its whole answer or error
    is_whole: bool
    """Whether all tokens of the answer were told, here or before the event that was begun after.
    If not, the answer says more than they did."""


Event = Queued | Begun | NewTokens | Silence | Ended


def event_id(text: str | None, name: str = "Last-Event-ID") -> EventId | None:
    """An event's id as a client names it; None if it names none. Raises `RequestError`."""
    if not text:
        return None
    if (found := EventId.read(text)) is None:
        raise RequestError(f"{name} must be the id of an event, such as 1-17.", param=name)
    return found


async def events(
    here: Services, tenant: str, job_id: UUID, after: EventId | None = None
) -> AsyncIterator[Event]:
    """What happens to a tenant's job until it has ended, after an event that was told before.

    The first event comes at once; what is wrong is raised before it: `JobNotFound`, `Busy` if too
    many listen already, `Unavailable`. Later nothing is raised but `JobNotFound`, if the job is
    deleted: while Postgres or Redis is away, there is `Silence`. Ends without `Ended` if this
    server stops: come back to another one with the last event's id. Close it (`aclosing`) if you
    leave early.
    """
    with (
        here.waiters.watching([job_id], is_poll=False) as watch,
        here.listeners.listening(job_id, after, watch.wake) as listener,
    ):
        row = _Row(here, tenant, job_id, await here.job(tenant, job_id), watch.wake)
        try:
            async for event in _until_final(row, watch, listener, here.waiters):
                yield event
        finally:
            row.leave()
        if row.seen.is_final:
            async for event in _rest(listener):
                yield event
            reading = listener.reading
            is_of_answer = reading.after is not None and reading.after.attempt == row.attempt
            yield Ended(row.seen, reading.is_whole and is_of_answer)


async def _until_final(
    row: _Row, watch: Watch, listener: Listener, waiters: Waiters
) -> AsyncIterator[Event]:
    yield row.place if row.is_queued else Silence()
    spoke_at = time.monotonic()
    while not waiters.is_closed:
        watch.wake.clear()
        if watch.noticed:
            watch.noticed.clear()
            row.look()
        if row.has_moved():
            yield row.place  # and no word, to those who are not told of it
        if row.seen.is_final:
            return
        for event in await _news(listener):
            yield event
            spoke_at = time.monotonic()
            if listener.is_behind:  # there may be more
                watch.wake.set()
        if time.monotonic() - spoke_at >= KEEP_ALIVE_S:
            yield Silence()
            spoke_at = time.monotonic()
        if not watch.wake.is_set():
            with suppress(TimeoutError):  # `wait_for` would make a task, for each token
                async with asyncio.timeout(row.next_look_s()):
                    await watch.wake.wait()


class _Row:
    """The job as it was seen last. Looks do not keep tokens waiting."""

    def __init__(
        self, here: Services, tenant: str, job_id: UUID, seen: Snapshot, wake: asyncio.Event
    ) -> None:
        self.seen = seen
        self._read = partial(here.job, tenant, job_id)
        self._wake = wake
        self._looking: asyncio.Task[Snapshot] | None = None
        self._is_asked = False
        self._look_at = time.monotonic() + LOOK_S
        self._told = self.place

    @property
    def is_queued(self) -> bool:
        return self.seen.state is JobState.QUEUED

    @property
    def place(self) -> Queued:
        job = self.seen.job
        return Queued(job.position, job.eta) if job is not None else Queued(None, None)

    @property
    def attempt(self) -> int:
        """Number of its last one; 0 if there was none."""
        attempts = self.seen.job.attempts if self.seen.job is not None else []
        return attempts[-1].number if attempts else 0

    def look(self) -> None:
        """As soon as may be: something has happened."""
        self._is_asked = True

    def has_moved(self) -> bool:
        """Take what a look has brought, and begin the next if it is time; whether the job waits,
        and elsewhere than it was told to. Raises `JobNotFound`."""
        if self._looking is not None and self._looking.done():
            looked, self._looking = self._looking, None
            self._look_at = time.monotonic() + LOOK_S
            with suppress(Unavailable):
                self.seen = looked.result()
        if self._looking is None and (self._is_asked or time.monotonic() >= self._look_at):
            self._is_asked = False
            self._looking = asyncio.create_task(self._read())
            self._looking.add_done_callback(lambda _: self._wake.set())
        if not self.is_queued:
            return False
        told, self._told = self._told, self.place
        return told != self._told

    def next_look_s(self) -> float:
        if self._looking is not None:
            return LOOK_S
        return max(0.0, self._look_at - time.monotonic())

    def leave(self) -> None:
        if self._looking is not None:
            self._looking.cancel()


async def _news(listener: Listener) -> list[Event]:
    try:
        return [_event(entry) for entry in await listener.news()]
    except Unavailable:
        return []  # it is tried again when more comes


async def _rest(listener: Listener) -> AsyncIterator[Event]:
    """The last tokens of a job that has ended."""
    give_up_at = time.monotonic() + REST_S
    reading = listener.reading
    with suppress(Unavailable):
        while not reading.is_whole:
            before = reading.after
            for entry in await listener.fetched():
                yield _event(entry)
            if reading.after == before:
                if before is None or reading.has_gap or time.monotonic() > give_up_at:
                    return
                await asyncio.sleep(REST_LOOK_S)


def _event(entry: Entry) -> Event:
    match entry.told:
        case told.Started(batch_id, batch_size):
            return Begun(entry.id, batch_id, batch_size)
        case told.Tokens(index, text) as tokens:
            return NewTokens(entry.id, index, text, tokens)
    raise TypeError(entry.told)
