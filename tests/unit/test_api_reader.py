"""Reads of single jobs share their looks at Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.reader import AT_ONCE, MOST_JOBS, Reader, Snapshot
from app.errors import JobNotFound, Unavailable

IDS = [UUID(int=number) for number in range(1, 300)]


class Postgres:
    """Looks wait in here until they are let through; each sees the version of its beginning."""

    def __init__(self) -> None:
        self.looks: list[Sequence[UUID]] = []
        self.tenants: list[str] = []  #: of each look
        self.version = 0
        self.error: Callable[[Sequence[UUID]], Exception | None] = lambda ids: None
        self.missing: set[UUID] = set()
        self._gates: list[asyncio.Event] = []

    async def look(self, tenant: str, ids: Sequence[UUID]) -> dict[UUID, Snapshot]:
        self.looks.append(ids)
        self.tenants.append(tenant)
        version = self.version
        gate = asyncio.Event()
        self._gates.append(gate)
        await gate.wait()
        if error := self.error(ids):
            raise error
        return {id: Snapshot(False, b"%d" % version) for id in ids if id not in self.missing}

    async def let_all_through(self, *asked: asyncio.Task[Snapshot]) -> None:
        while not all(task.done() for task in asked):
            for gate in self._gates:
                gate.set()
            await asyncio.sleep(0)


async def ask(reader: Reader, *ids: UUID, tenant: str = "one") -> list[asyncio.Task[Snapshot]]:
    tasks = [asyncio.create_task(reader.read(tenant, id)) for id in ids]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


def play(scene: Callable[[Postgres, Reader], Awaitable[None]]) -> None:
    async def run() -> None:
        postgres = Postgres()
        await scene(postgres, Reader(postgres.look))

    asyncio.run(run())


def test_who_asks_alone_is_looked_for_at_once() -> None:
    async def scene(postgres: Postgres, reader: Reader) -> None:
        tasks = await ask(reader, IDS[0])

        assert postgres.looks == [[IDS[0]]]
        await postgres.let_all_through(*tasks)
        assert tasks[0].result().body == b"0"

    play(scene)


def test_all_who_ask_while_looks_are_on_their_way_share_the_next_one() -> None:
    async def scene(postgres: Postgres, reader: Reader) -> None:
        first = [task for id in IDS[:AT_ONCE] for task in await ask(reader, id)]

        crowd = await ask(reader, *IDS[10:13] * 500)

        assert len(postgres.looks) == AT_ONCE
        await postgres.let_all_through(*first, *crowd)
        assert postgres.looks[AT_ONCE:] == [IDS[10:13]]

    play(scene)


def test_what_a_look_on_its_way_may_have_missed_is_looked_for_again() -> None:
    async def scene(postgres: Postgres, reader: Reader) -> None:
        before = await ask(reader, IDS[0])
        postgres.version = 1

        after = await ask(reader, IDS[0])

        await postgres.let_all_through(*before, *after)
        assert (before[0].result().body, after[0].result().body) == (b"0", b"1")

    play(scene)


def test_a_look_is_of_one_tenant_and_the_same_id_of_another_is_another_question() -> None:
    async def scene(postgres: Postgres, reader: Reader) -> None:
        held = [task for id in IDS[:AT_ONCE] for task in await ask(reader, id)]

        ours = await ask(reader, *IDS[10:12])
        theirs = await ask(reader, IDS[10], tenant="two")

        await postgres.let_all_through(*held, *ours, *theirs)
        asked = dict(zip(postgres.tenants[AT_ONCE:], postgres.looks[AT_ONCE:], strict=True))
        assert asked == {"one": IDS[10:12], "two": [IDS[10]]}

    play(scene)


def test_a_caller_that_goes_away_takes_nothing_from_the_others() -> None:
    async def scene(postgres: Postgres, reader: Reader) -> None:
        gone, patient = await ask(reader, IDS[0], IDS[0])

        gone.cancel()

        await postgres.let_all_through(patient)
        assert patient.result().body == b"0"

    play(scene)


def test_what_goes_wrong_with_one_job_is_not_the_others_trouble() -> None:
    async def scene(postgres: Postgres, reader: Reader) -> None:
        postgres.error = lambda ids: ValueError("odd") if IDS[7] in ids else None
        postgres.missing = {IDS[8]}
        held = await ask(reader, *IDS[:AT_ONCE])

        tasks = await ask(reader, IDS[6], IDS[7], IDS[8])

        await postgres.let_all_through(*held, *tasks)
        assert tasks[0].result().body == b"0"
        with pytest.raises(ValueError, match="odd"):
            tasks[1].result()
        with pytest.raises(JobNotFound):
            tasks[2].result()

    play(scene)


def test_while_postgres_is_away_everybody_hears_of_it_after_one_look() -> None:
    async def scene(postgres: Postgres, reader: Reader) -> None:
        postgres.error = lambda ids: Unavailable("away")

        tasks = await ask(reader, *IDS[:50])

        await postgres.let_all_through(*tasks)
        assert all(isinstance(task.exception(), Unavailable) for task in tasks)
        assert len(postgres.looks) <= AT_ONCE + 1

    play(scene)


@given(groups=st.lists(st.lists(st.sampled_from(IDS), max_size=250), max_size=6))
def test_everybody_is_answered_and_looks_are_few_and_small(groups: list[list[UUID]]) -> None:
    async def scene(postgres: Postgres, reader: Reader) -> None:
        tasks = [task for ids in groups for task in await ask(reader, *ids)]

        await postgres.let_all_through(*tasks)

        assert all(task.result().body == b"0" for task in tasks)
        assert all(len(ids) == len(set(ids)) <= MOST_JOBS for ids in postgres.looks)

    play(scene)
