"""Long polls with scripted reads in place of the database."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from uuid import uuid4

from app.api.waiting import Waiters

JOB = uuid4()
LONG_S = 30.0


class Row:
    """A job whose state a test sets, and which counts how often it is read."""

    def __init__(self) -> None:
        self.is_final = False
        self.num_reads = 0
        self.was_read = asyncio.Event()
        self.on_read: Callable[[], None] = lambda: None

    async def read(self) -> bool:
        self.num_reads += 1
        seen = self.is_final
        self.on_read()
        self.was_read.set()
        return seen


def follow(waiters: Waiters, row: Row, timeout_s: float = LONG_S) -> Awaitable[bool]:
    return waiters.until(lambda is_final: is_final, row.read, JOB, timeout_s)


def run(scenario: Callable[[Waiters, Row], Awaitable[None]]) -> Waiters:
    async def play() -> Waiters:
        waiters = Waiters()
        waiters.open()
        async with asyncio.timeout(10):
            await scenario(waiters, Row())
        return waiters

    return asyncio.run(play())


def test_a_final_job_is_answered_after_one_read() -> None:
    async def scenario(waiters: Waiters, row: Row) -> None:
        row.is_final = True

        assert await follow(waiters, row) is True
        assert row.num_reads == 1

    run(scenario)


def test_a_notice_from_another_thread_wakes_those_who_wait_for_that_job() -> None:
    async def scenario(waiters: Waiters, row: Row) -> None:
        waiting = asyncio.ensure_future(follow(waiters, row))
        await row.was_read.wait()

        row.is_final = True
        await asyncio.to_thread(waiters.job_is_done, JOB)

        assert await waiting is True
        assert row.num_reads == 2

    run(scenario)


def test_a_notice_for_another_job_wakes_nobody() -> None:
    async def scenario(waiters: Waiters, row: Row) -> None:
        waiting = asyncio.ensure_future(follow(waiters, row))
        await row.was_read.wait()

        waiters.job_is_done(uuid4())
        waiters.job_is_done(uuid4())
        for _ in range(5):
            await asyncio.sleep(0)

        assert row.num_reads == 1
        waiting.cancel()

    run(scenario)


def test_a_job_that_ends_while_it_is_being_read_is_not_missed() -> None:
    async def scenario(waiters: Waiters, row: Row) -> None:
        def end_after_the_read() -> None:
            row.is_final = True
            row.on_read = lambda: None
            waiters.job_is_done(JOB)

        row.on_read = end_after_the_read

        assert await follow(waiters, row) is True
        assert row.num_reads == 2

    run(scenario)


def test_after_a_reconnect_everybody_looks_again() -> None:
    async def scenario(waiters: Waiters, row: Row) -> None:
        waiting = asyncio.ensure_future(follow(waiters, row))
        await row.was_read.wait()

        row.is_final = True  # its notice was lost
        waiters.look_again()

        assert await waiting is True

    run(scenario)


def test_a_hold_that_runs_out_ends_with_a_last_look() -> None:
    async def scenario(waiters: Waiters, row: Row) -> None:
        waiting = asyncio.ensure_future(follow(waiters, row, timeout_s=0.02))
        await row.was_read.wait()

        row.is_final = True

        assert await waiting is True
        assert row.num_reads == 2

    run(scenario)


def test_closing_answers_those_who_wait_and_those_who_come_later_at_once() -> None:
    async def scenario(waiters: Waiters, row: Row) -> None:
        waiting = asyncio.ensure_future(follow(waiters, row))
        await row.was_read.wait()

        waiters.close()

        assert await waiting is False
        assert await follow(waiters, row) is False

    run(scenario)


def test_nothing_is_kept_of_those_who_left() -> None:
    async def scenario(waiters: Waiters, row: Row) -> None:
        waiting = asyncio.ensure_future(follow(waiters, row))
        await row.was_read.wait()
        assert waiters.num_waiting == 1

        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

        assert waiters.num_waiting == 0
        assert not waiters._events

    run(scenario)
