"""Bodies share a room: bounded, without deadlock, and not for those who stand still."""

from __future__ import annotations

import asyncio

import pytest
from fastapi import Request
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from app.api.wire import room as rooms
from app.api.wire.raw_bodies import body_of
from app.api.wire.room import FREE_BYTES, Room
from app.errors import Busy

LARGEST = 100_000
JSON = {
    "type": "http",
    "method": "POST",
    "headers": [(b"content-type", b"application/json")],
}


class Body:
    """Comes in pieces, is worked on until it is let go, and has ended well or not."""

    def __init__(self, room: Room, *sizes: int) -> None:
        self.let_go = asyncio.Event()
        self.is_complete = asyncio.Event()
        self.task = asyncio.create_task(self._arrive(room, sizes))

    async def _arrive(self, room: Room, sizes: tuple[int, ...]) -> None:
        with room.share() as share:
            async with share.arriving():
                for size in sizes:
                    if not size:
                        await asyncio.Event().wait()  # it stands still
                    share.came(size)
                    await share.keep()
                    await asyncio.sleep(0)
            self.is_complete.set()
            await self.let_go.wait()


async def settle() -> None:
    """Everything goes as far as it gets."""
    for _ in range(20):
        await asyncio.sleep(0)


@given(
    bodies=st.lists(
        st.lists(st.integers(1, 40_000), min_size=1, max_size=12).filter(
            lambda sizes: sum(sizes) <= LARGEST
        ),
        max_size=12,
    ),
    spare=st.integers(0, 200_000),
)
def test_bodies_that_have_half_arrived_never_wait_for_each_other(
    bodies: list[list[int]], spare: int
) -> None:
    async def arrive() -> None:
        room = Room(LARGEST + spare, LARGEST)
        most = 0

        async def one(sizes: list[int]) -> None:
            nonlocal most
            with room.share() as share:
                async with share.arriving():
                    for size in sizes:
                        share.came(size)
                        await share.keep()
                        most = max(most, room.held)
                        await asyncio.sleep(0)

        await asyncio.wait_for(asyncio.gather(*map(one, bodies)), 30)
        assert most <= LARGEST + spare
        assert room.held == 0

    asyncio.run(arrive())


def test_a_small_body_is_taken_whatever_large_ones_hold() -> None:
    async def arrive() -> None:
        room = Room(LARGEST, LARGEST)
        large = [Body(room, LARGEST), Body(room, LARGEST)]
        await settle()
        assert [each.is_complete.is_set() for each in large] == [True, False]

        small = Body(room, FREE_BYTES)
        await settle()

        assert small.is_complete.is_set()
        for each in (*large, small):
            each.let_go.set()
            await each.task

    asyncio.run(arrive())


def test_bodies_take_their_turn_and_one_that_has_waited_too_long_is_told_to_come_back(
    short: pytest.MonkeyPatch,
) -> None:
    short.setattr(rooms, "WAIT_S", 0.05)

    async def arrive() -> None:
        room = Room(LARGEST, LARGEST)
        worked_on = Body(room, LARGEST)
        await settle()
        waiting = Body(room, LARGEST)

        with pytest.raises(Busy):
            await waiting.task

        assert not room.is_short
        worked_on.let_go.set()
        await worked_on.task
        assert room.held == 0

    asyncio.run(arrive())


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Whoever stands still has no time left once another waits, and all the time until then."""
    monkeypatch.setattr(rooms, "HURRIED_S", 0.0)
    monkeypatch.setattr(rooms, "PATIENT_S", 1_000.0)
    monkeypatch.setattr(rooms, "READ_TIMEOUT_S", 1_000.0)
    return monkeypatch


def test_a_body_that_stands_still_gives_way_once_another_waits_and_not_before(
    short: pytest.MonkeyPatch,
) -> None:
    async def arrive() -> None:
        room = Room(2 * LARGEST, LARGEST)
        still = [Body(room, LARGEST, 0), Body(room, LARGEST, 0)]
        await asyncio.sleep(0.05)  # the second has the way out: that is not to wait
        assert not any(each.task.done() for each in still)

        one_more = Body(room, LARGEST)
        await asyncio.wait_for(one_more.is_complete.wait(), 30)

        for each in still:
            with pytest.raises(TimeoutError):
                await each.task
        one_more.let_go.set()
        await one_more.task
        assert room.held == 0

    asyncio.run(arrive())


def test_all_that_give_way_together_are_told_so_though_room_is_there_once_the_first_has_left(
    short: pytest.MonkeyPatch,
) -> None:
    async def arrive() -> None:
        room = Room(2 * LARGEST, LARGEST)

        async def stand_still() -> None:
            pieces = iter([b"x" * LARGEST])

            async def receive() -> dict[str, object]:
                for piece in pieces:
                    return {"type": "http.request", "body": piece, "more_body": True}
                return await asyncio.Future()

            async with body_of(Request(JSON, receive), LARGEST, room):
                pass

        still = [asyncio.create_task(stand_still()) for _ in range(2)]
        await settle()
        one_more = Body(room, LARGEST)

        outcomes = await asyncio.gather(*still, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Busy, Busy]

        one_more.let_go.set()
        await one_more.task

    asyncio.run(asyncio.wait_for(arrive(), 30))


def test_who_is_cancelled_while_it_waits_leaves_the_room_to_others() -> None:
    async def arrive() -> None:
        room = Room(LARGEST, LARGEST)
        first, gone, last = (Body(room, LARGEST) for _ in range(3))
        await settle()

        gone.task.cancel()
        first.let_go.set()
        await settle()

        assert last.is_complete.is_set()
        last.let_go.set()
        await last.task
        assert (room.held, room.is_short) == (0, False)

    asyncio.run(arrive())


def test_a_storm_of_large_bodies_takes_a_few_pieces_in_each_turn_of_the_loop() -> None:
    async def arrive() -> None:
        # given
        room = Room(100 * LARGEST, LARGEST)
        num_taken = 0

        async def come() -> None:
            nonlocal num_taken
            with room.share() as share:
                async with share.arriving():
                    share.came(2 * FREE_BYTES)
                    await share.keep()
                num_taken += 1

        # when
        bodies = [asyncio.create_task(come()) for _ in range(100)]
        gone = bodies.pop(50)
        in_each_turn = []
        while not all(body.done() for body in bodies):
            before = num_taken
            await asyncio.sleep(0)
            in_each_turn.append(num_taken - before)
            gone.cancel()

        # then
        assert num_taken == 99
        assert max(in_each_turn) <= rooms.PIECES_A_TURN

    asyncio.run(arrive())


def test_what_is_refused_is_dropped_a_few_pieces_in_each_turn_of_the_loop() -> None:
    async def arrive() -> None:
        # given a hundred bodies that are refused, and come as fast as they are read
        room = Room(100 * LARGEST, LARGEST)
        num_dropped = 0

        async def receive() -> dict[str, object]:
            nonlocal num_dropped
            num_dropped += 1
            return {"type": "http.request", "body": b"x" * 1_000, "more_body": True}

        async def come() -> None:
            scope = {"type": "http", "method": "POST", "headers": []}
            with pytest.raises(HTTPException, match="415"):
                async with body_of(Request(scope, receive), LARGEST, room):
                    pass

        bodies = [asyncio.create_task(come()) for _ in range(100)]
        await asyncio.sleep(0)

        # when
        in_each_turn = []
        for _ in range(1_000):
            before = num_dropped
            await asyncio.sleep(0)
            in_each_turn.append(num_dropped - before)

        # then each of them gets on
        assert max(in_each_turn) <= rooms.PIECES_A_TURN
        assert num_dropped > 900
        for body in bodies:
            body.cancel()
        await asyncio.gather(*bodies, return_exceptions=True)

    asyncio.run(asyncio.wait_for(arrive(), 30))


def test_bodies_that_stood_still_together_are_given_up_a_few_in_each_turn_of_the_loop() -> None:
    async def arrive() -> None:
        # given a hundred that have sent nothing yet
        room = Room(100 * LARGEST, LARGEST)
        num_ended = 0

        async def stand_still() -> None:
            nonlocal num_ended
            with pytest.raises(HTTPException):
                async with body_of(Request(JSON, asyncio.Future), LARGEST, room):
                    pass
            num_ended += 1

        bodies = [asyncio.create_task(stand_still()) for _ in range(100)]
        await asyncio.sleep(0)
        for share in list(room._arriving):
            share._end = 0.0
            share.heed_time()

        # when
        in_each_turn = []
        while num_ended < 100:
            before = num_ended
            await asyncio.sleep(0)
            in_each_turn.append(num_ended - before)

        # then
        assert max(in_each_turn) <= rooms.PIECES_A_TURN
        await asyncio.gather(*bodies)

    asyncio.run(asyncio.wait_for(arrive(), 30))
