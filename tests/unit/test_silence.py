"""A job that waits long, and whoever listens to it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, nullcontext
from itertools import count
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest

from app.api.live import events
from app.api.live.events import Queued, Silence
from app.api.live.waiting import Waiters
from app.jobs import JobState


def test_a_place_that_changes_all_the_time_is_no_word_to_keep_a_connection_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # given a job whose place is another one at each look, and looks that are many to a keep-alive
    monkeypatch.setattr(events, "LOOK_S", 0.01)
    monkeypatch.setattr(events, "KEEP_ALIVE_S", 0.1)
    places = count(1)

    async def look(tenant: str, job_id: UUID) -> Any:
        job = SimpleNamespace(position=next(places), eta=None, attempts=[])
        return SimpleNamespace(state=JobState.QUEUED, is_final=False, job=job)

    async def nothing() -> list[Any]:
        return []

    listener = SimpleNamespace(news=nothing)
    listeners = SimpleNamespace(listening=lambda *_: nullcontext(listener))
    here = SimpleNamespace(waiters=Waiters(), listeners=listeners, job=look)

    async def told() -> list[Any]:
        heard: list[Any] = []
        happening = cast(Any, events.events(cast(Any, here), "default", UUID(int=1)))
        async with aclosing(happening), asyncio.timeout(30):
            async for event in happening:
                heard.append(event)
                if isinstance(event, Silence):
                    break
        return heard

    # then it is told, and doors that have no word for it hear that it is quiet all the same
    *moves, last = asyncio.run(told())
    assert last == Silence() and len(moves) > 2
    assert all(isinstance(each, Queued) for each in moves)
