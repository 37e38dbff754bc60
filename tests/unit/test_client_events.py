"""A client's stream of events: put together from any pieces, and gone on with where it broke."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gristmill_client import AsyncClient, Client, JobEvent, JobState
from gristmill_client.errors import GristmillError, JobNotFound, Unavailable
from gristmill_client.events import EventReader

TOLD = [
    JobEvent("queued", {"position": 3}),
    JobEvent("started", {"attempt": 1}, "1-0"),
    *(JobEvent("tokens", {"index": 0, "text": f"t{n} 漢"}, f"1-{n}") for n in range(1, 6)),
    JobEvent("end", {"complete": True, "job": {"id": "j", "state": "completed"}}, "1-5"),
]


def wire(events: list[JobEvent], line_end: str = "\n") -> bytes:
    lines = [": keep-alive", ""]
    for each in events:
        lines += [f"event: {each.event}", f"data: {json.dumps(each.data)}"]
        lines += [f"id: {each.id}"] if each.event not in ("queued", "end") else []
        lines.append("")
    return (line_end.join(lines) + line_end).encode()


@given(st.sampled_from(["\n", "\r\n"]), st.lists(st.integers(1, 40), max_size=30))
def test_events_are_the_same_in_whatever_pieces_they_come(line_end: str, sizes: list[int]) -> None:
    reader, rest, read = EventReader(), wire(TOLD, line_end), []
    for size in [*sizes, 10_000]:
        read += reader.read(rest[:size])
        rest = rest[size:]

    assert read == TOLD


def test_an_event_that_broke_off_after_its_id_is_asked_for_again() -> None:
    reader = EventReader("1-0")

    assert list(reader.read(b'id: 1-1\nevent: tokens\ndata: {"text": "a"}\n')) == []
    assert reader.last_id == "1-0"
    assert [each.id for each in reader.read(b"\n")] == ["1-1"] == [reader.last_id]


@pytest.mark.parametrize("data", ["", "[]", "nonsense", "NaN", "[" * 100_000])
def test_what_is_no_event_is_an_error_in_words(data: str) -> None:
    with pytest.raises(GristmillError, match="is it Gristmill's"):
        list(EventReader().read(f"data: {data}\n\n".encode()))


class Piece(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that is cut off by an error, or by nothing."""

    def __init__(self, content: bytes, error: Exception | None = None) -> None:
        self._content, self._error = content, error

    def __iter__(self) -> Iterator[bytes]:
        yield self._content
        if self._error is not None:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for each in self:
            yield each


class Server:
    """Tells what follows the last id, so many events to a connection, and then breaks off."""

    def __init__(self, *lives: int | httpx.Response | Exception) -> None:
        self._lives = list(lives)
        self.asked: list[str | None] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        last = request.headers.get("last-event-id")
        self.asked.append(last)
        life = self._lives.pop(0) if len(self._lives) > 1 else self._lives[0]
        if isinstance(life, Exception):
            raise life
        if isinstance(life, httpx.Response):
            return httpx.Response(life.status_code, content=life.content)
        new = [each for each in TOLD if not each.id or not last or each.id > last or each.job]
        error = httpx.ReadError("reset") if len(self._lives) % 2 else None
        return httpx.Response(200, stream=Piece(wire(new[:life]), error))


def stream(kind: str, server: Server, **options: Any) -> list[JobEvent]:
    options = {"transport": httpx.MockTransport(server), "patience_s": 2.0} | options
    if kind == "sync":
        with Client("http://test/", **options) as client:
            return list(client.stream("j"))

    async def go() -> list[JobEvent]:
        async with AsyncClient("http://test/", **options) as client:
            return [each async for each in client.stream("j")]

    return asyncio.run(go())


both = pytest.mark.parametrize("kind", ["sync", "async"])


@both
def test_a_stream_that_breaks_off_goes_on_where_it_was(kind: str) -> None:
    server = Server(3, httpx.Response(503), 3, httpx.ConnectError("away"), 3, 99)

    events = stream(kind, server)

    told = [each for each in events if each.event in ("started", "tokens")]
    assert told == TOLD[1:-1]
    assert events[-1].job is not None and events[-1].job.state is JobState.COMPLETED
    assert "".join(each.text for each in events) == "".join(f"t{n} 漢" for n in range(1, 6))
    assert server.asked[0] is None and server.asked[1:3] == ["1-1", "1-1"]


@both
def test_an_api_that_is_gone_is_waited_for_as_long_as_patience_lasts(kind: str) -> None:
    with pytest.raises(Unavailable):
        stream(kind, Server(3, httpx.ConnectError("away")), patience_s=0)


@both
def test_a_job_that_is_not_there_is_an_error_at_once(kind: str) -> None:
    told = {"code": "job_not_found", "detail": "No such job."}
    server = Server(httpx.Response(404, json=told))

    with pytest.raises(JobNotFound):
        stream(kind, server)
    assert len(server.asked) == 1


@both
def test_who_leaves_early_leaves_no_connection_open(kind: str) -> None:
    server = Server(99)

    if kind == "sync":
        with Client("http://test/", transport=httpx.MockTransport(server)) as client:
            for each in client.stream("j", "1-3"):
                assert each.event == "queued"
                break
    else:

        async def go() -> None:
            async with AsyncClient("http://test/", transport=httpx.MockTransport(server)) as client:
                events = client.stream("j", "1-3")
                assert (await anext(events)).event == "queued"
                await events.aclose()

        asyncio.run(go())
    assert server.asked == ["1-3"]
