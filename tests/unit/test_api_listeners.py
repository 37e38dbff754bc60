"""Listeners of one stream: each has all of it, whenever it comes and however slowly it reads."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import Any, cast
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.live.followers import Listener, Listeners
from app.broker.events import Entry, EventId, Started, Tokens, Whole
from app.broker.streams import PAGE, Streams
from app.errors import Busy

JOB = UUID(int=1)


def stream_of(runs: list[int]) -> list[Entry]:
    """Each run an attempt, of so many tokens."""
    entries = []
    for attempt, number in enumerate(runs, start=1):
        told = [Started(JOB, 1), *(Tokens(0, f"{n};") for n in range(number))]
        told += [Whole()] if attempt == len(runs) else []
        entries += [Entry(EventId(attempt, n), each) for n, each in enumerate(told)]
    return entries


class Server:
    """Redis, and what this process has read of it."""

    def __init__(self, stream: list[Entry], kept: int, page: int) -> None:
        self._stream, self._page = stream, page
        self.num_written = self.num_read = 0
        self.recent = deque[Entry](maxlen=kept)

    def write(self, number: int) -> None:
        self.num_written = min(len(self._stream), self.num_written + number)

    def read(self) -> None:
        """The thread's read: all that is new."""
        self.recent.extend(self._stream[self.num_read : self.num_written])
        self.num_read = self.num_written

    async def page(self, after: EventId | None) -> list[Entry]:
        written = self._stream[: self.num_written]
        return [each for each in written if after is None or each.id > after][: self._page]


@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.lists(st.integers(0, 5), max_size=40),
)
def test_a_listener_has_all_whenever_it_comes_and_however_slowly_it_reads(
    runs: list[int], kept: int, page: int, moves: list[int]
) -> None:
    async def scenario() -> None:
        stream = stream_of(runs)
        server = Server(stream, kept, page)
        listeners: list[Listener] = []
        had: list[list[Entry]] = []

        def come() -> None:
            listeners.append(Listener(server.recent, server.page, None, is_first=not listeners))
            had.append([])

        come()
        for move in [*moves, 5, 4]:
            match move:
                case 0:
                    come()
                case 1 | 2:
                    server.write(move)
                case 3:
                    server.read()
                case 4:
                    for number, listener in enumerate(listeners):
                        had[number] += await listener.news()
                case _:
                    had[-1] += await listeners[-1].news()
        server.write(len(stream))
        server.read()
        for number, listener in enumerate(listeners):
            while new := await listener.news():
                had[number] += new
            assert listener.reading.is_whole and not listener.reading.has_gap

        last = [each for each in stream if each.id.attempt == len(runs)][:-1]
        for each in had:
            assert [it.id for it in each] == sorted({it.id for it in each})
            assert each[-len(last) :] == last

    asyncio.run(scenario())


def test_a_second_listener_has_at_once_what_the_first_was_told() -> None:
    async def scenario() -> None:
        stream = stream_of([3])
        server = Server(stream, kept=2, page=9)
        server.write(3)
        server.read()
        server.recent.clear()  # the first one came back, and had all that is kept
        late = Listener(server.recent, server.page, None, is_first=False)

        assert await late.news() == stream[:3]

    asyncio.run(scenario())


class Silent:
    """A Redis in which nothing happens."""

    def __init__(self) -> None:
        self.followed: dict[UUID, EventId | None] = {}

    def follow(self, *job: Any) -> Any:
        if job:
            self.followed[job[0]] = job[1]
        return self

    def leave(self, job_id: UUID) -> None:
        del self.followed[job_id]

    def wake(self) -> None:
        pass


def test_listeners_are_counted_and_leave_nothing_behind() -> None:
    async def scenario() -> None:
        redis = Silent()
        listeners = Listeners(cast("Streams", redis), most=2)
        listeners.open()
        wake = asyncio.Event()
        with (
            listeners.listening(JOB, None, wake) as one,
            listeners.listening(JOB, EventId(1, 3), asyncio.Event()),
        ):
            assert redis.followed == {JOB: None} and listeners.num_listening == 2
            with pytest.raises(Busy), listeners.listening(JOB, None, wake):
                pass

            # when more is told than is kept
            entries = [Entry(EventId(1, n), Tokens(0, "x")) for n in range(3 * PAGE)]
            listeners._tell({JOB: entries, UUID(int=2): entries}, threading.Event())

            assert wake.is_set() and len(one._recent) == PAGE
        assert not redis.followed and not listeners._followed and not listeners.num_listening
        listeners.close()

    asyncio.run(scenario())
