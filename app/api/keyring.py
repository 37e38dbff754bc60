"""Whose key came with a call. Answers are kept for a moment, so that a key costs no statement a
request.

What was revoked or has expired is refused `FRESH_S` later at the latest. Until there ever was a key
an API that only this machine reaches serves whoever comes; it looks for the first one as often.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

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
"""Answers that are kept. Those about unknown ids have a place of their own: whoever tries many
drives no valid key out."""

_NOBODYS: Final = bytes(32)
"""Compared with where there is no such key, so that it takes as long."""


@dataclass(frozen=True, slots=True)
class _Answer:
    known: Known | None
    fresh_until_s: float
    valid_until_s: float

    def fits(self, digest: bytes, now_s: float) -> bool:
        is_same = hmac.compare_digest(self.known.digest if self.known else _NOBODYS, digest)
        return is_same and self.known is not None and now_s < self.valid_until_s


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
        """`find` looks for a key by its id, and notes its use if the digest is its own; `any_made`
        says whether there ever was one. `is_open`: until then nobody needs one."""
        self._find = find
        self._any_made = any_made
        self._clock = clock
        self._known: OrderedDict[str, _Answer] = OrderedDict()
        self._unknown: OrderedDict[str, _Answer] = OrderedDict()
        self._looking: dict[str, asyncio.Task[_Answer]] = {}
        self._is_open = is_open
        self._open_until_s = -math.inf

    async def caller(self, given: str | None) -> Caller:
        """Whose key it is. Raises `NoKey`, and `Unavailable` if that cannot be looked up."""
        id = id_of(given) if given is not None else None
        if id is not None and given is not None:
            answer = self._kept(id) or await self._look(id, digest_of(given))
            if answer.fits(digest_of(given), self._clock()) and answer.known:
                return Caller(answer.known.tenant, answer.known.scopes, id)
        if await self._serves_anybody():
            return ANYBODY
        if given is None:
            raise NoKey()
        raise NoKey("This API key is not known, or not valid any more.")

    def _kept(self, id: str) -> _Answer | None:
        answer = self._known.get(id) or self._unknown.get(id)
        return answer if answer and self._clock() < answer.fresh_until_s else None

    async def _look(self, id: str, digest: bytes) -> _Answer:
        """All who come with a key while it is looked for share the look."""
        task = self._looking.get(id)
        if task is None:
            task = self._looking[id] = asyncio.create_task(self._looked(id, digest))
            task.add_done_callback(lambda _: self._looking.pop(id, None))
        return await asyncio.shield(task)

    async def _looked(self, id: str, digest: bytes) -> _Answer:
        began_s = self._clock()  # what is true from here on may not be true any more
        known = await self._find(id, digest)
        valid_s = math.inf if known is None or known.valid_s is None else known.valid_s
        answer = _Answer(known, began_s + FRESH_S, began_s + valid_s)
        self._known.pop(id, None)
        self._unknown.pop(id, None)
        kept, most = (self._known, MOST_KNOWN) if known else (self._unknown, MOST_UNKNOWN)
        kept[id] = answer
        if len(kept) > most:
            kept.popitem(last=False)
        return answer

    async def _serves_anybody(self) -> bool:
        if self._is_open and self._clock() >= self._open_until_s:
            began_s = self._clock()
            self._is_open = not await self._any_made()
            self._open_until_s = began_s + FRESH_S
        return self._is_open


def look_up(database: Database, id: str, digest: bytes) -> Known | None:
    """The key of an id; notes its use, now and then, if this is its digest. Not for the event loop.

    Raises `Unavailable`.
    """
    with acting_for(EVERYBODY), database.begin() as connection:
        known = keys.find(connection, id)
        if known and hmac.compare_digest(known.digest, digest) and not known.is_use_noted:
            keys.note_use(connection, id)
    return known


def any_made(database: Database) -> bool:
    """Whether there ever was a key. Not for the event loop. Raises `Unavailable`."""
    with acting_for(EVERYBODY), database.begin() as connection:
        return keys.any_made(connection)
