"""Whose key came with a call. Answers are kept for a moment, so that a key costs no statement a
request.

What was revoked or has expired is refused `FRESH_S` later at the latest. Until there ever was a key
an API that only this machine reaches serves whoever comes; it looks for the first one as often.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from app.api.caller import ANYBODY, Caller
from app.errors import NoKey
from app.keys import digest_of, id_of
from app.store import keys
from app.store.database import Database
from app.store.keys import Known
from app.store.tenancy import EVERYBODY, acting_for

FRESH_S: Final = 5.0
"""How long an answer counts."""
MOST_KNOWN: Final = 10_000
MOST_UNKNOWN: Final = 1_000
"""Answers that are kept. Those about unknown keys have a place of their own: whoever tries many
drives no valid one out."""

_ANY: Final = b""
"""No key's digest: stands for the question whether there is any key."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Answer:
    known: Known | None
    fresh_until_s: float
    valid_until_s: float


class Keyring:
    """Owner of what is known of keys; belongs to the event loop's thread."""

    def __init__(
        self,
        find: Callable[[str, bytes], Awaitable[Known | None]],
        any_made: Callable[[], Awaitable[bool]],
        *,
        is_open: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`find` looks for a key by its id and digest, and notes its use; `any_made` says whether
        there ever was one. `is_open`: until then nobody needs one."""
        self._find = find
        self._any_made = any_made
        self._clock = clock
        #: By digest, so that what comes with another secret under a key's id is another's affair.
        self._known: OrderedDict[bytes, _Answer] = OrderedDict()
        self._unknown: OrderedDict[bytes, _Answer] = OrderedDict()
        self._looking: dict[bytes, asyncio.Task[Any]] = {}
        self._is_open = is_open
        self._open_until_s = -math.inf

    async def caller(self, given: str | None) -> Caller:
        """Whose key it is. Raises `NoKey`, and `Unavailable` if that cannot be looked up."""
        id = id_of(given) if given is not None else None
        if given is not None and id is not None:
            digest = digest_of(given)
            answer = self._kept(digest)
            if answer is None:
                answer = await self._look(digest, lambda: self._found(id, digest))
            if answer.known and self._clock() < answer.valid_until_s:
                return Caller(answer.known.tenant, answer.known.scopes, id)
        if await self._serves_anybody():
            return ANYBODY
        if given is None:
            raise NoKey()
        raise NoKey("This API key is not known, or not valid any more.")

    def _kept(self, digest: bytes) -> _Answer | None:
        answer = self._known.get(digest) or self._unknown.get(digest)
        return answer if answer and self._clock() < answer.fresh_until_s else None

    async def _look(self, what: bytes, look: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """All who ask the same while it is looked for share the look."""
        task: asyncio.Task[T] | None = self._looking.get(what)
        if task is None:
            task = self._looking[what] = asyncio.create_task(look())
            task.add_done_callback(lambda _: self._looking.pop(what, None))
        return await asyncio.shield(task)

    async def _found(self, id: str, digest: bytes) -> _Answer:
        began_s = self._clock()  # what is true from here on may not be true any more
        known = await self._find(id, digest)
        valid_s = math.inf if known is None or known.valid_s is None else known.valid_s
        answer = _Answer(known, began_s + FRESH_S, began_s + valid_s)
        self._known.pop(digest, None)
        self._unknown.pop(digest, None)
        kept, most = (self._known, MOST_KNOWN) if known else (self._unknown, MOST_UNKNOWN)
        kept[digest] = answer
        if len(kept) > most:
            kept.popitem(last=False)
        return answer

    async def _serves_anybody(self) -> bool:
        if self._is_open and self._clock() >= self._open_until_s:
            await self._look(_ANY, self._look_for_any)
        return self._is_open

    async def _look_for_any(self) -> None:
        began_s = self._clock()
        self._is_open = not await self._any_made()
        self._open_until_s = began_s + FRESH_S


def look_up(database: Database, id: str, digest: bytes) -> Known | None:
    """The key of this id and digest; notes its use, now and then. Not for the event loop.

    Raises `Unavailable`.
    """
    with acting_for(EVERYBODY), database.begin() as connection:
        known = keys.find(connection, id, digest)
        if known and not known.is_use_noted:
            keys.note_use(connection, id)
    return known


def any_made(database: Database) -> bool:
    """Whether there ever was a key. Not for the event loop. Raises `Unavailable`."""
    with acting_for(EVERYBODY), database.begin() as connection:
        return keys.any_made(connection)
