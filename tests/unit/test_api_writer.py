"""Single submissions share their commits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api import writer as writing
from app.api.writer import AT_ONCE, MOST_JOBS, Writer
from app.errors import GristmillError, QueueFull, RequestError, Unavailable
from app.intake.submit import Stored, Submitted
from app.jobs import Kind
from app.store.submissions import NewJob

AT = datetime(2026, 1, 1, tzinfo=UTC)


def job(number: int, tenant: str = "one") -> NewJob:
    return NewJob(
        id=UUID(int=number + 1),
        model="m",
        kind=Kind.GENERATE,
        url="/v1/completions",
        request={},
        fingerprint="",
        source="api",
        tenant=tenant,
    )


class Postgres:
    """Writes wait in here until they are let through."""

    def __init__(self) -> None:
        self.groups: list[Sequence[NewJob]] = []
        self.outcome: Callable[[NewJob], Submitted | GristmillError] = lambda new: Submitted(
            new.id, True
        )
        self.error: Callable[[Sequence[NewJob]], Exception | None] = lambda group: None
        self.sent: list[UUID] = []
        self._gates: list[asyncio.Event] = []

    async def write(self, group: Sequence[NewJob]) -> Stored:
        self.groups.append(group)
        self._gates.append(gate := asyncio.Event())
        await gate.wait()
        if error := self.error(group):
            raise error
        outcomes = [self.outcome(new) for new in group]
        created = [
            new
            for new, outcome in zip(group, outcomes, strict=True)
            if isinstance(outcome, Submitted) and outcome.created
        ]
        return Stored(outcomes, created, created, AT)

    async def send(self, stored: Stored) -> None:
        self.sent += [new.id for new in stored.to_send]

    async def let_all_through(self, asked: Sequence[asyncio.Task[Stored]]) -> None:
        while not all(task.done() for task in asked):
            for gate in self._gates:
                gate.set()
            await asyncio.sleep(0)


async def submit(writer: Writer, *numbers: int, tenant: str = "one") -> list[asyncio.Task[Stored]]:
    tasks = [asyncio.create_task(writer.store(job(number, tenant))) for number in numbers]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


def play(scene: Callable[[Postgres, Writer], Awaitable[None]]) -> None:
    async def run() -> None:
        postgres = Postgres()
        await scene(postgres, Writer(postgres.write, postgres.send))

    asyncio.run(run())


def test_a_lone_submission_is_stored_at_once_and_many_share_few_commits() -> None:
    async def scene(postgres: Postgres, writer: Writer) -> None:
        # Given as many as may be on their way
        first = [await submit(writer, number) for number in range(AT_ONCE)]
        assert [len(group) for group in postgres.groups] == [1] * AT_ONCE

        # When more come than go into one group
        rest = await submit(writer, *range(AT_ONCE, AT_ONCE + MOST_JOBS + 7))
        assert len(postgres.groups) == AT_ONCE
        tasks = [task for each in first for task in each] + rest
        await postgres.let_all_through(tasks)

        # Then they went together, in the order in which they came
        assert [len(group) for group in postgres.groups] == [1] * AT_ONCE + [MOST_JOBS, 7]
        told = [task.result().only.job_id for task in tasks]
        assert told == [job(number).id for number in range(AT_ONCE + MOST_JOBS + 7)]
        await asyncio.sleep(0)
        assert sorted(postgres.sent) == sorted(told)

    play(scene)


@given(
    st.lists(st.sampled_from(["new", "replayed", "refused"]), min_size=1, max_size=40),
    st.lists(st.integers(0, 39), max_size=5),
)
def test_each_is_told_what_became_of_it_alone(fates: list[str], leavers: list[int]) -> None:
    async def scene(postgres: Postgres, writer: Writer) -> None:
        # Given submissions of which each has a fate, and some whose callers leave
        def outcome(new: NewJob) -> Submitted | GristmillError:
            fate = fates[new.id.int - 1]
            if fate == "refused":
                return RequestError(f"no {new.id.int}")
            return Submitted(new.id if fate == "new" else UUID(int=1000), fate == "new")

        postgres.outcome = outcome
        tasks = await submit(writer, *range(len(fates)))
        for number in leavers:
            if number < len(tasks):
                tasks[number].cancel()

        # When they are written
        await postgres.let_all_through(tasks)

        # Then whoever stayed has its own outcome, and its own new job
        for number, (task, fate) in enumerate(zip(tasks, fates, strict=True)):
            if task.cancelled():
                continue
            stored = task.result()
            assert stored.new_jobs == ([job(number)] if fate == "new" else [])
            if fate == "refused":
                with pytest.raises(RequestError, match=f"^no {number + 1}$"):
                    _ = stored.only
            else:
                assert stored.only.created == (fate == "new")
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)

    play(scene)


def test_who_does_not_fit_together_is_tried_alone() -> None:
    async def scene(postgres: Postgres, writer: Writer) -> None:
        # Given a queue with room for one more, but not for a group
        postgres.error = lambda group: QueueFull("full") if job(7) in group else None
        first = await submit(writer, *range(AT_ONCE))
        rest = await submit(writer, 6, 7, 8)

        # When they are written
        await postgres.let_all_through(first + rest)

        # Then only the one that does not fit is refused
        assert isinstance(rest[1].exception(), QueueFull)
        assert [rest[place].result().only.created for place in (0, 2)] == [True, True]

    play(scene)


def test_a_group_is_of_one_tenant_and_tenants_take_turns() -> None:
    async def scene(postgres: Postgres, writer: Writer) -> None:
        # Given one with more than a group beside another's single submission
        tasks = [task for number in range(AT_ONCE) for task in await submit(writer, number)]
        tasks += await submit(writer, *range(100, 100 + 2 * MOST_JOBS))
        tasks += await submit(writer, 7, tenant="two")

        # When they are written
        await postgres.let_all_through(tasks)

        # Then the single one waited for one group, and for no more
        told = [({new.tenant for new in group}, len(group)) for group in postgres.groups]
        assert told[AT_ONCE:] == [({"one"}, MOST_JOBS), ({"two"}, 1), ({"one"}, MOST_JOBS)]

    play(scene)


def test_an_outage_is_told_to_all_of_the_group_and_the_next_one_is_tried() -> None:
    async def scene(postgres: Postgres, writer: Writer) -> None:
        # Given an outage during the writing of groups
        postgres.error = lambda group: None if job(99) in group else Unavailable("away")
        first = await submit(writer, *range(AT_ONCE))
        rest = await submit(writer, 20, 21)
        await postgres.let_all_through(first + rest)
        assert all(isinstance(task.exception(), Unavailable) for task in first + rest)

        # When one comes after it
        later = await submit(writer, 99)
        await postgres.let_all_through(later)

        # Then it is stored
        assert later[0].result().only.created

    play(scene)


def test_submissions_that_come_together_wait_for_more_and_a_lone_one_for_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scene(postgres: Postgres, writer: Writer) -> None:
        turn, pause_is_over = asyncio.sleep, asyncio.Event()

        async def sleep(seconds: float) -> None:
            await (pause_is_over.wait() if seconds else turn(0))

        monkeypatch.setattr(asyncio, "sleep", sleep)

        # Given one alone, and two that came together
        tasks = await submit(writer, 0)
        tasks += await submit(writer, 1, 2)
        assert [len(group) for group in postgres.groups] == [1, 2]

        # When others come, one by one, while both groups are on their way
        for number in range(3, 7):
            tasks += await submit(writer, number)
        assert len(postgres.groups) == 2
        pause_is_over.set()
        await turn(0)
        await submit(writer)

        # Then they are a group, and who comes alone after that is one
        assert [len(group) for group in postgres.groups] == [1, 2, 4]
        await postgres.let_all_through(tasks)
        tasks = await submit(writer, 7)
        tasks += await submit(writer, 8)
        assert [len(group) for group in postgres.groups] == [1, 2, 4, 1, 1]
        await postgres.let_all_through(tasks)

    monkeypatch.setattr(writing, "GATHER_S", 1e9)
    play(scene)
