"""Long polls with scripted reads in place of the database."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

import app.api.live.waiting
from app.api.live.waiting import Waiters

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
    return waiters.until(row.read, lambda final: [] if final else [JOB], [JOB], timeout_s)


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
        await asyncio.to_thread(waiters.jobs_are_done, [JOB])

        assert await waiting is True
        assert row.num_reads == 2

    run(scenario)


def test_a_notice_for_another_job_wakes_nobody() -> None:
    async def scenario(waiters: Waiters, row: Row) -> None:
        waiting = asyncio.ensure_future(follow(waiters, row))
        await row.was_read.wait()

        waiters.jobs_are_done([uuid4()])
        waiters.jobs_are_done([uuid4()])
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
            waiters.jobs_are_done([JOB])

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


def test_a_job_whose_news_was_lost_is_seen_before_the_hold_runs_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(app.api.live.waiting, "LOOK_AGAIN_S", 0.01)

    async def scenario(waiters: Waiters, row: Row) -> None:
        following = asyncio.ensure_future(follow(waiters, row, timeout_s=60))
        await row.was_read.wait()

        row.is_final = True  # its worker died before it told so

        assert await asyncio.wait_for(following, 10) is True

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
        assert not waiters._watches

    run(scenario)


# ── for several jobs ────────────────────────────────────────────────────────────────────────────


class Rows:
    """Jobs that a test ends, and which count how often they are read."""

    def __init__(self, number: int) -> None:
        self.ids = [uuid4() for _ in range(number)]
        self.open = set(self.ids)
        self.num_reads = 0
        self.was_read = asyncio.Event()

    async def read(self) -> set[UUID]:
        self.num_reads += 1
        seen = set(self.open)
        await asyncio.sleep(0)  # what happens from here on is not seen
        self.was_read.set()
        return seen

    def end(self, waiters: Waiters, *ids: UUID) -> None:
        self.open -= set(ids)
        for job_id in ids:
            waiters.jobs_are_done([job_id])

    def follow(
        self, waiters: Waiters, for_all: bool, gather_s: float = 0.0
    ) -> Awaitable[set[UUID]]:
        def still_open(seen: set[UUID]) -> set[UUID]:
            return seen if for_all or len(seen) == len(self.ids) else set()

        return waiters.until(
            *(self.read, still_open, self.ids, LONG_S), for_all=for_all, gather_s=gather_s
        )


def test_who_waits_for_all_looks_once_more_when_the_last_has_ended() -> None:
    async def scenario(waiters: Waiters, _: Row) -> None:
        rows = Rows(300)
        waiting = asyncio.ensure_future(rows.follow(waiters, for_all=True))
        await rows.was_read.wait()
        assert waiters.num_waiting == 4  # one long poll, and one for each hundred jobs

        for job_id in rows.ids:
            rows.end(waiters, job_id)
            await asyncio.sleep(0)

        assert await waiting == set()
        assert rows.num_reads == 2

    assert run(scenario).num_waiting == 0


def test_who_waits_for_any_looks_again_at_the_first() -> None:
    async def scenario(waiters: Waiters, _: Row) -> None:
        rows = Rows(3)
        waiting = asyncio.ensure_future(rows.follow(waiters, for_all=False))
        await rows.was_read.wait()

        rows.end(waiters, rows.ids[1])

        assert await waiting == {rows.ids[0], rows.ids[2]}
        assert rows.num_reads == 2

    assert not run(scenario)._watches


def test_who_gathers_looks_once_all_have_ended() -> None:
    async def scenario(waiters: Waiters, _: Row) -> None:
        rows = Rows(3)
        waiting = asyncio.ensure_future(rows.follow(waiters, for_all=False, gather_s=LONG_S))
        await asyncio.sleep(0)

        for job_id in rows.ids:
            assert not waiting.done() and rows.num_reads == 0
            rows.end(waiters, job_id)
            await asyncio.sleep(0)

        assert await waiting == set()
        assert rows.num_reads == 1

    run(scenario)


def test_an_end_between_two_looks_is_not_gathered_for() -> None:
    async def scenario(waiters: Waiters, _: Row) -> None:
        rows = Rows(3)
        rows.end(waiters, rows.ids[0])
        await asyncio.sleep(0)

        waiting = asyncio.ensure_future(rows.follow(waiters, for_all=False, gather_s=LONG_S))
        await asyncio.sleep(0)
        rows.end(waiters, *rows.ids[1:])

        assert await waiting == set()
        assert rows.num_reads == 1

    run(scenario)


def test_who_has_gathered_waits_for_any() -> None:
    async def scenario(waiters: Waiters, _: Row) -> None:
        rows = Rows(3)
        waiting = asyncio.ensure_future(rows.follow(waiters, for_all=False, gather_s=0.001))
        await rows.was_read.wait()

        rows.end(waiters, rows.ids[1])

        assert await waiting == {rows.ids[0], rows.ids[2]}
        assert rows.num_reads == 2

    run(scenario)


def test_nobody_gathers_once_all_are_to_go() -> None:
    async def scenario(waiters: Waiters, _: Row) -> None:
        rows = Rows(3)
        gathering = rows.follow(waiters, for_all=False, gather_s=LONG_S)
        waiting = asyncio.ensure_future(gathering)
        await asyncio.sleep(0)

        waiters.close()

        assert len(await waiting) == 3
        assert len(await rows.follow(waiters, for_all=False, gather_s=LONG_S)) == 3

    run(scenario)


@given(
    ends=st.lists(st.tuples(st.lists(st.integers(0, 4)), st.integers(0, 3))), for_all=st.booleans()
)
def test_no_end_is_missed_whenever_it_comes(
    ends: list[tuple[list[int], int]], for_all: bool
) -> None:
    """Jobs end before, between and during the reads, their notices come once or more."""

    async def scenario(waiters: Waiters, _: Row) -> None:
        rows = Rows(5)
        waiting = asyncio.ensure_future(rows.follow(waiters, for_all=for_all))

        for numbers, turns in [*ends, (list(range(5)), 0)]:
            rows.end(waiters, *(rows.ids[n] for n in numbers))
            for _ in range(turns):
                await asyncio.sleep(0)

        seen = await waiting
        assert not seen if for_all else len(seen) < 5

    run(scenario)
