"""API keys as text, and whose key came with a call."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.caller import ANYBODY, Caller
from app.api.keyring import FRESH_S, MOST_UNKNOWN, Keyring
from app.errors import NoKey, Unavailable
from app.keys import NewKey, Scope, digest_of, id_of, is_shaped, new_key
from app.store.keys import Known
from tests.apis import with_another_secret

READS = frozenset({Scope.READ})


def test_a_key_names_itself_and_no_two_are_alike() -> None:
    keys = [new_key() for _ in range(100)]

    assert {id_of(key.text) for key in keys} == {key.id for key in keys}
    assert len({key.text for key in keys}) == len({key.id for key in keys}) == 100
    assert all(re.fullmatch(r"[!-~]{1,100}", key.text) and is_shaped(key.text) for key in keys)
    assert all(key.digest == digest_of(key.text) for key in keys)


@given(st.integers(0, 54), st.characters(codec="ascii"))
def test_a_key_with_any_other_character_is_none(place: int, other: str) -> None:
    text = new_key().text
    mistyped = text[:place] + other + text[place + 1 :]

    assert (id_of(mistyped) is None) == (mistyped != text)


@given(st.text())
def test_no_text_is_a_key_by_chance(text: str) -> None:
    assert id_of(text) is None


class Postgres:
    """Keys by their ids, and how often it was asked."""

    def __init__(self) -> None:
        self.keys: dict[str, Known] = {}
        self.digests: dict[str, bytes] = {}
        self.looks: list[str] = []
        self.asked_for_any = 0
        self.error: Exception | None = None

    def add(self, key: NewKey, tenant: str = "ours", valid_s: float | None = None) -> None:
        self.keys[key.id] = Known(tenant, READS, valid_s, True)
        self.digests[key.id] = key.digest

    async def find(self, id: str, digest: bytes) -> Known | None:
        self.looks.append(id)
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        return self.keys.get(id) if digest == self.digests.get(id) else None

    async def any_made(self) -> bool:
        self.asked_for_any += 1
        found = bool(self.keys)
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        return found


class Scene:
    def __init__(self, is_open: bool = False) -> None:
        self.now_s = 1_000.0
        self.postgres = Postgres()
        self.ring = Keyring(
            self.postgres.find,
            self.postgres.any_made,
            is_open=is_open,
            clock=lambda: self.now_s,
        )

    async def is_refused(self, key: str | None) -> bool:
        try:
            await self.ring.caller(key)
        except NoKey:
            return True
        return False


def play(scene: Callable[[Scene], Awaitable[None]], *, is_open: bool = False) -> None:
    asyncio.run(_run(scene, Scene(is_open)))


async def _run(scene: Callable[[Scene], Awaitable[None]], it: Scene) -> None:
    await scene(it)


def test_a_key_is_looked_up_once_in_a_while_however_often_it_comes() -> None:
    async def scene(it: Scene) -> None:
        key = new_key()
        it.postgres.add(key)

        callers = await asyncio.gather(*(it.ring.caller(key.text) for _ in range(50)))
        callers += [await it.ring.caller(key.text) for _ in range(50)]

        assert set(callers) == {Caller("ours", READS, key.id)}
        assert it.postgres.looks == [key.id]
        it.now_s += FRESH_S
        await it.ring.caller(key.text)
        assert it.postgres.looks == [key.id] * 2

    play(scene)


def test_what_was_revoked_is_refused_within_the_time_that_is_promised() -> None:
    async def scene(it: Scene) -> None:
        key = new_key()
        it.postgres.add(key)
        await it.ring.caller(key.text)

        it.postgres.keys[key.id] = replace(it.postgres.keys[key.id], valid_s=0.0)
        it.now_s += FRESH_S

        assert await it.is_refused(key.text)

    play(scene)


def test_a_key_ends_at_its_very_time_and_not_with_the_next_look() -> None:
    async def scene(it: Scene) -> None:
        key = new_key()
        it.postgres.add(key, valid_s=1.5)
        assert not await it.is_refused(key.text)

        it.now_s += 1.5

        assert await it.is_refused(key.text)

    play(scene)


def test_another_secret_under_a_known_id_is_refused_and_keeps_the_right_one_from_nothing() -> None:
    async def scene(it: Scene) -> None:
        key = new_key()
        it.postgres.add(key)
        wrong = with_another_secret(key)

        assert await it.is_refused(wrong)
        assert await it.is_refused(wrong)
        assert it.postgres.looks == [key.id]
        assert not await it.is_refused(key.text)
        assert it.postgres.looks == [key.id] * 2  # by which its use is noted
        assert await it.is_refused(wrong)

    play(scene)


def test_whoever_tries_many_keys_drives_no_valid_one_out() -> None:
    async def scene(it: Scene) -> None:
        key = new_key()
        it.postgres.add(key)
        await it.ring.caller(key.text)

        for _ in range(MOST_UNKNOWN + 10):
            assert await it.is_refused(new_key().text)

        await it.ring.caller(key.text)
        assert it.postgres.looks.count(key.id) == 1
        assert len(it.ring._unknown) == MOST_UNKNOWN

    play(scene)


def test_what_is_no_key_is_refused_without_asking_anybody() -> None:
    async def scene(it: Scene) -> None:
        for text in (None, "", "sk-another", "gm_", new_key().text[:-1], "gm_" + "é" * 50):
            assert await it.is_refused(text)

        assert it.postgres.looks == []

    play(scene)


def test_anybody_is_served_until_there_is_a_key_and_never_again() -> None:
    async def scene(it: Scene) -> None:
        assert await it.ring.caller(None) == ANYBODY
        assert await it.ring.caller("sk-none") == ANYBODY
        assert it.postgres.asked_for_any == 1

        it.postgres.add(new_key())
        it.now_s += FRESH_S
        assert await it.is_refused(None)

        it.postgres.keys.clear()
        it.now_s += FRESH_S
        assert await it.is_refused(None)

    play(scene, is_open=True)


def test_all_who_come_without_a_key_share_one_look_for_the_first() -> None:
    async def scene(it: Scene) -> None:
        callers = await asyncio.gather(*(it.ring.caller(None) for _ in range(50)))

        assert set(callers) == {ANYBODY}
        assert it.postgres.asked_for_any == 1
        it.now_s += FRESH_S
        await asyncio.gather(*(it.ring.caller(None) for _ in range(50)))
        assert it.postgres.asked_for_any == 2

    play(scene, is_open=True)


def test_while_nobody_can_say_whether_there_is_a_key_nobody_is_served() -> None:
    async def scene(it: Scene) -> None:
        it.postgres.error = Unavailable("away")

        with pytest.raises(Unavailable):
            await it.ring.caller(None)
        with pytest.raises(Unavailable):
            await it.ring.caller(new_key().text)

        it.postgres.error = None
        assert await it.ring.caller(None) == ANYBODY

    play(scene, is_open=True)
