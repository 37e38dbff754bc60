"""Tokens on their way from the engine process to Redis: in order, once, and in nobody's way."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.broker.events import Entry, Reading, Started, Tokens, Whole, decode
from app.broker.streams import Written
from app.engines.base import NewTokens
from app.errors import Unavailable
from app.worker import streams as streams_module
from app.worker.engine import outlet as outlet_module
from app.worker.engine.outlet import Outlet
from app.worker.engine.pipe import WorkerEnd
from app.worker.streams import TokenStreams
from app.worker.work import Job
from tests.waiting import eventually


@dataclass
class FakeRedis:
    """Streams as Redis keeps them. It can be away, and lose its answer."""

    fails: Callable[[], bool] = lambda: False
    loses_answer: Callable[[], bool] = lambda: False
    streams: dict[UUID, list[Entry]] = field(default_factory=dict)

    def write(self, events: Sequence[Written]) -> None:
        if self.fails():
            raise Unavailable("Redis does not answer.")
        for each in events:
            stream = self.streams.setdefault(each.job_id, [])
            if not stream or each.id > stream[-1].id:  # as XADD refuses it
                told = decode(each.text)
                assert told is not None
                stream.append(Entry(each.id, told))
        if self.loses_answer():
            raise Unavailable("Redis does not answer.")

    def told(self, job_id: UUID) -> list[Any]:
        return [each.told for each in self.streams.get(job_id, [])]


def job(number: int = 1, *, attempt: int = 1, sequences: int = 1, stream: bool = True) -> Job:
    batch = SimpleNamespace(id=UUID(int=9), num_jobs=3)
    run = SimpleNamespace(batch=batch, number=attempt)
    made = SimpleNamespace(
        id=UUID(int=number), stream_events=stream, num_sequences=sequences, claimed_run=run
    )
    return cast("Job", made)


def sequences_of(*ids: int) -> Any:
    return [SimpleNamespace(id=each) for each in ids]


def new(sequence_id: int, text: str) -> NewTokens:
    return NewTokens(sequence_id, tuple(text.encode()), text)


@pytest.fixture
def server() -> FakeRedis:
    return FakeRedis()


@pytest.fixture
def streams(server: FakeRedis) -> Iterator[TokenStreams]:
    streams = TokenStreams(server.write)
    streams.start()
    yield streams
    streams.stop()


@pytest.fixture
def outlet(streams: TokenStreams) -> Iterator[Outlet]:
    ours, theirs = socket.socketpair()
    streams.hear(ours)
    outlet = Outlet(theirs)
    yield outlet
    outlet.close()


STARTED = Started(UUID(int=9), 3)


def test_a_job_is_told_of_from_its_start_to_its_last_token(
    streams: TokenStreams, outlet: Outlet, server: FakeRedis
) -> None:
    streams.enter([job(sequences=2), job(2, stream=False)], sequences_of(1, 2, 3))
    streams.begin(job())
    eventually(lambda: server.told(job().id) == [STARTED])

    outlet.send([new(1, "rye"), new(2, "oat"), new(3, "x")], [2])
    outlet.send([new(1, " mill")], [1])

    eventually(lambda: server.told(job().id)[-1:] == [Whole()])
    texts = [each for each in server.told(job().id) if isinstance(each, Tokens)]
    assert "".join(each.text for each in texts if each.index == 0) == "rye mill"
    assert "".join(each.text for each in texts if each.index == 1) == "oat"
    assert server.told(job(2).id) == []


def test_what_an_engine_that_was_lost_has_told_is_void(
    streams: TokenStreams, outlet: Outlet, server: FakeRedis
) -> None:
    # given a job whose engine is lost after a token, and that is run again
    streams.enter([job()], sequences_of(1))
    outlet.send([new(1, "a")], [])
    eventually(lambda: len(server.told(job().id)) == 2)
    streams.enter([job()], sequences_of(5))

    # when both engines speak
    outlet.send([new(1, "late"), new(5, "b")], [5])

    eventually(lambda: Whole() in server.told(job().id))
    told = server.told(job().id)
    assert [type(each) for each in told] == [Started, Tokens, Started, Tokens, Whole]
    assert told[3].text == "b"
    assert [str(each.id) for each in server.streams[job().id]] == [f"1-{n}" for n in range(5)]


def test_a_job_that_comes_back_in_another_attempt_begins_with_its_number(
    streams: TokenStreams, outlet: Outlet, server: FakeRedis
) -> None:
    streams.enter([job()], sequences_of(1))
    outlet.send([new(1, "a")], [])
    eventually(lambda: len(server.told(job().id)) == 2)
    streams.leave(job())

    streams.enter([job(attempt=2)], sequences_of(2))
    outlet.send([new(2, "b")], [2])

    eventually(lambda: Whole() in server.told(job().id))
    assert [str(each.id) for each in server.streams[job().id]] == [
        "1-0",
        "1-1",
        "2-0",
        "2-1",
        "2-2",
    ]


def test_a_job_that_has_gone_leaves_nothing_behind(
    streams: TokenStreams, outlet: Outlet, server: FakeRedis
) -> None:
    streams.enter([job(1), job(2)], sequences_of(1, 2))
    outlet.send([new(1, "a"), new(2, "b")], [1])

    streams.leave(job(1))
    streams.leave(job(2))

    eventually(lambda: Whole() in server.told(job(1).id))
    eventually(lambda: not streams._streams and not streams._owners and not streams._fresh)
    assert Whole() not in server.told(job(2).id)


def test_an_engine_never_waits_for_who_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    # given a worker that does not read, and room for little
    monkeypatch.setattr(outlet_module, "MAX_UNSENT_BYTES", 10_000)
    ours, theirs = socket.socketpair()
    outlet = Outlet(theirs)

    # when more is told than there is room for
    for _ in range(2_000):
        outlet.send([new(1, "x" * 1_000)], [])
    outlet.send([], [1])

    # then it is told, as soon as somebody reads, whose tokens are missing
    end = WorkerEnd(ours)
    lost: set[int] = set()

    def is_told() -> bool:
        while end.poll():
            lost.update(end.recv().lost)
        outlet.send([], [])
        return bool(lost)

    eventually(is_told)
    assert lost == {1}
    outlet.close()
    end.close()


def test_a_reader_that_has_gone_is_no_matter_for_the_engine() -> None:
    ours, theirs = socket.socketpair()
    outlet = Outlet(theirs)
    ours.close()

    for _ in range(3):
        outlet.send([new(1, "a")], [])
    outlet.rest()


def test_who_reads_finds_out_what_was_dropped_while_redis_was_away(
    streams: TokenStreams,
    outlet: Outlet,
    server: FakeRedis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # given a Redis that is away for longer than there is room
    monkeypatch.setattr(streams_module, "MAX_HELD", 100)
    streams.enter([job()], sequences_of(1))
    outlet.send([new(1, "a")], [])
    eventually(lambda: len(server.told(job().id)) == 2)
    away = True
    server.fails = lambda: away
    for _ in range(200):
        outlet.send([new(1, "ten bytes ")], [])
    eventually(lambda: streams._streams[job().id].is_broken)

    # when it is back
    away = False
    outlet.send([new(1, "z")], [1])
    streams.enter([job(2)], sequences_of(2))
    outlet.send([new(2, "b")], [2])

    # then others are told of as ever, and of this one nothing with a hole
    eventually(lambda: Whole() in server.told(job(2).id))
    reading = Reading()
    told = list(reading.take(server.streams[job().id]))
    text = "".join(each.told.text for each in told if isinstance(each.told, Tokens))
    assert text and ("a" + "ten bytes " * 200 + "z").startswith(text)
    assert not reading.is_whole


def test_a_redis_that_stays_away_is_tried_ever_more_seldom_until_it_is_back() -> None:
    # given something to tell
    life = Life()
    life.enter(1)
    life.tokens(1, "a")

    # when it cannot be told for a long time
    life.is_now("away")
    pauses = []
    for _ in range(6):
        life.turn()
        pauses.append(life.streams._retry_s)

    # then each pause is longer than the one before, up to five seconds
    assert pauses == [0.5, 1, 2, 4, 5, 5]
    life.is_now("back")
    life.turn()
    assert life.server.told(job(1).id)
    life.is_now("away")
    life.tokens(1, "b")
    life.turn()
    assert life.streams._retry_s == 0.5
    life.end()


# ── any order of things ─────────────────────────────────────────────────────────────────────────

steps = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.integers(1, 3)),
        st.tuples(st.just("attempt"), st.integers(1, 3)),
        st.tuples(st.just("tokens"), st.integers(1, 3), st.text("abc", min_size=1, max_size=3)),
        st.tuples(st.just("late"), st.integers(1, 3), st.text("xyz", min_size=1, max_size=3)),
        st.tuples(st.just("turn")),
        st.tuples(st.just("is_now"), st.sampled_from(["away", "unanswered", "back"])),
    ),
    max_size=40,
)


class Life:
    """Three jobs that come, run, are lost and come again, without a thread."""

    def __init__(self) -> None:
        self.mood = ""
        self.server = FakeRedis(lambda: self.mood == "away", lambda: self.mood == "unanswered")
        self.streams = TokenStreams(self.server.write)
        self.streams._thread = cast("Any", SimpleNamespace(is_alive=lambda: True))
        self.streams._wake = lambda: None  # type: ignore[method-assign]
        self.ours, theirs = socket.socketpair()
        self.streams.hear(self.ours)
        self.outlet = Outlet(theirs)
        self.attempts = {1: 1, 2: 1, 3: 1}
        self.inside: dict[int, int] = {}  #: by job, its sequence in the engine
        self.before: dict[int, int] = {}  #: that which it had before
        self.texts: dict[int, str] = {}
        self.next_id = 1

    def enter(self, number: int) -> None:
        if number in self.inside:
            self.before[number] = self.inside[number]
        again = [job(number, attempt=self.attempts[number])]
        self.streams.enter(again, sequences_of(self.next_id))
        self.inside[number], self.texts[number] = self.next_id, ""
        self.next_id += 1

    def attempt(self, number: int) -> None:
        if number in self.inside:
            self.streams.leave(job(number, attempt=self.attempts[number]))
            self.attempts[number] += 1
            self.enter(number)

    def tokens(self, number: int, text: str) -> None:
        if number in self.inside:
            self.outlet.send([new(self.inside[number], text)], [])
            self.texts[number] += text

    def late(self, number: int, text: str) -> None:
        if number in self.before:
            self.outlet.send([new(self.before[number], text)], [])

    def turn(self) -> None:
        self.streams._retry_at = 0.0
        self.streams._turn()

    def is_now(self, mood: str) -> None:
        self.mood = mood

    def end(self) -> None:
        self.mood = ""
        self.outlet.send([], list(self.inside.values()))
        for number in self.inside:
            self.streams.leave(job(number, attempt=self.attempts[number]))
        for _ in range(3):
            self.turn()
        self.ours.close()
        self.outlet.close()


@given(steps)
def test_whatever_happens_the_last_run_of_a_job_is_told_whole_and_once(
    taken: list[tuple[Any, ...]],
) -> None:
    life = Life()
    for name, *given_ in taken:
        getattr(life, name)(*given_)
    life.end()

    for number, text in life.texts.items():
        reading = Reading()
        told = list(reading.take(life.server.streams[UUID(int=number)]))
        assert "".join(it.told.text for it in told if isinstance(it.told, Tokens)) == text
        assert reading.is_whole and reading.after is not None
        assert reading.after.attempt == life.attempts[number]
    assert not life.streams._streams and not life.streams._owners and not life.streams._held
