"""What is worked on for submissions: bounded, and given back when it has ended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from types import SimpleNamespace
from typing import Any, Final

import pytest

from app.api import services, work
from app.api.probe import Probe
from app.api.services import Services
from app.api.threads import Call, Threads
from app.api.work import SMALL_AT_ONCE, SMALL_BYTES, Work
from app.errors import Busy, Unavailable
from app.intake.decision import Decision


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  (threads set it)
        await asyncio.sleep(0.001)


LARGE: Final = SMALL_BYTES + 1


class Bench:
    """Each piece of work lasts until it is told to end."""

    def __init__(self) -> None:
        self.work = Work()
        self.begun: list[str] = []
        self._ends: dict[str, threading.Event] = {}

    def start(self, name: str, num_bytes: int) -> asyncio.Task[str]:
        self._ends[name] = threading.Event()
        return asyncio.create_task(self.work.run(num_bytes, self._piece, name))

    def _piece(self, name: str) -> str:
        self.begun.append(name)
        assert self._ends[name].wait(60)
        return name

    def end(self, *names: str) -> None:
        for name in names:
            self._ends[name].set()

    async def has_begun(self, *names: str) -> None:
        """Returns when these have, and sees that no other one does."""
        await until(lambda: set(self.begun) >= set(names))
        for _ in range(20):
            await asyncio.sleep(0)
        assert set(self.begun) == set(names)


@pytest.fixture(autouse=True)
def one_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "LARGE_AT_ONCE", 1)


def test_large_ones_are_worked_on_in_turn_and_small_ones_pass_them_by() -> None:
    async def test() -> None:
        # given a large one in hand, and one that waits
        bench = Bench()
        first, second = bench.start("first", LARGE), bench.start("second", LARGE)
        await bench.has_begun("first")

        # when a small one comes
        small = bench.start("small", SMALL_BYTES)

        # then it does not wait; the large one does, until its turn
        await bench.has_begun("first", "small")
        bench.end("first")
        await bench.has_begun("first", "small", "second")
        bench.end("second", "small")
        assert await asyncio.gather(first, second, small) == ["first", "second", "small"]

    run(test)


def test_work_that_its_caller_has_left_counts_until_it_has_ended() -> None:
    async def test() -> None:
        bench = Bench()
        left = bench.start("left", LARGE)
        await bench.has_begun("left")
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left

        following = bench.start("following", LARGE)
        await bench.has_begun("left")

        bench.end("left", "following")
        assert await following == "following"

    run(test)


def test_who_waits_for_too_long_is_told_that_there_is_too_much_in_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(work, "PATIENCE_S", 0.01)

    async def test() -> None:
        bench = Bench()
        first = bench.start("first", LARGE)
        await bench.has_begun("first")
        with pytest.raises(Busy):
            await bench.start("second", LARGE)

        # then nothing is kept of it, and its turn is not lost
        bench.end("first")
        await first
        third = bench.start("third", LARGE)
        bench.end("third")
        assert await third == "third"
        assert bench.begun == ["first", "third"]

    run(test)


def test_small_ones_are_bounded_in_number_and_an_error_ends_a_turn() -> None:
    async def test() -> None:
        bench = Bench()
        names = [str(place) for place in range(SMALL_AT_ONCE + 3)]
        many = [bench.start(name, 0) for name in names]
        await bench.has_begun(*names[:SMALL_AT_ONCE])
        bench.end(*names)
        await asyncio.gather(*many)

        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await bench.work.run(LARGE, lambda: 1 / 0)

    run(test)


def test_a_call_keeps_its_thread_until_it_has_ended_and_none_begins_that_was_left() -> None:
    async def test() -> None:
        # given the only thread, taken by a call whose caller has left
        threads, ended, begun = Threads(1), threading.Event(), []
        first = Call(lambda: (begun.append("first"), ended.wait(60)), threads)
        await until(lambda: begun == ["first"])
        assert not await first.ends(0)
        first.leave()

        # when another one is left, too, before it had a thread
        second = Call(lambda: begun.append("second"), threads)
        assert not await second.ends(0)
        second.leave()

        # then the thread is free when the first has ended, and the second never began
        third = Call(lambda: "third", threads)
        assert not await third.ends(0.01)
        ended.set()
        assert await third.ends(60)
        assert (third.result(), begun) == ("third", ["first"])

    run(test)


# ── the time of a write ─────────────────────────────────────────────────────────────────────────


def writing(ends: Callable[[Decision], bool]) -> type:
    """In place of a call that is committed: `ends` says each time whether it has ended."""

    class Writing:
        def __init__(self, call: Any, threads: object) -> None:
            self._decision = call.args[0]

        async def ends(self, within_s: float) -> bool:
            return ends(self._decision)

        def leave(self) -> None: ...

        def result(self) -> str:
            return "stored"

    return Writing


def write() -> Awaitable[str]:
    here: Any = SimpleNamespace(_limit_s=1.0, writers=None)
    return Services.write(here, lambda _: "")


def test_a_write_has_the_whole_time_for_each_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(decision: Decision) -> bool:
        if decision.num_steps == 10:
            return True
        decision.step()
        return False

    monkeypatch.setattr(services, "Call", writing(ends))

    async def test() -> None:
        assert await write() == "stored"

    run(test)


def test_a_write_that_makes_no_step_is_refused_and_none_of_it_is_committed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decisions = []

    def ends(decision: Decision) -> bool:
        decisions.append(decision)
        if len(decisions) == 1:
            decision.step()
        return False

    monkeypatch.setattr(services, "Call", writing(ends))

    async def test() -> None:
        with pytest.raises(Unavailable):
            await write()

    run(test)
    assert len(decisions) == 2
    for further in (decisions[0].step, decisions[0].commit):
        with pytest.raises(Unavailable):
            further()


def test_those_who_waited_for_one_look_are_answered_one_in_each_turn_of_the_loop() -> None:
    async def ask() -> None:
        looked = threading.Event()
        probe = Probe(looked.wait)
        num_told = 0

        async def wait() -> None:
            nonlocal num_told
            assert await probe.found()
            num_told += 1

        waiting = [asyncio.create_task(wait()) for _ in range(100)]
        await asyncio.sleep(0)
        looked.set()
        in_each_turn = []
        while num_told < 100:
            before = num_told
            await asyncio.sleep(0)
            in_each_turn.append(num_told - before)

        assert max(in_each_turn) == 1
        await asyncio.gather(*waiting)

    run(ask)
