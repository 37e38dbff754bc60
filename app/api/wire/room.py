"""Room: how many bytes of requests this process holds, and who gives way when there are too many.

the first bytes of a body    are always taken: small jobs get in, whatever large ones do
further ones                 as long as there is room
no room                      they wait unread, so that TCP holds their sender back; then `Busy`
the way out                  one body at a time is taken beyond that, up to its end: so bodies
                             that have half arrived never wait for each other
while anybody waits          bodies that stand still are given up much sooner
in each turn of the loop     a few pieces of large bodies are taken, a few are dropped, and a few
                             bodies given up: no storm of them keeps small requests waiting
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

from app.api.wire.turns import Turns
from app.errors import Busy

FREE_BYTES: Final = 32_768
"""Of each body. There are no more bodies than connections."""

PIECES_A_TURN: Final = 1
"""Of large bodies, of all together: a piece is 32 kB and takes a fraction of a millisecond, and so
does a refusal."""

WAIT_S: Final = 10.0
"""How long a body may wait for room, over all its parts; its turns come in any case."""

READ_TIMEOUT_S: Final = 60.0
"""How long a body may take to arrive, beside that."""


MIN_BYTES_PER_S: Final = 100_000
"""A body that comes more slowly uses up its slack, and one that comes faster earns it back."""

PATIENT_S: Final = 10.0
HURRIED_S: Final = 2.0
"""The slack of a body, while there is room and while others wait for some."""


class Room:
    """Owner of the count; belongs to the event loop's thread."""

    def __init__(self, max_bytes: int, largest: int) -> None:
        """`max_bytes` are held at most, beside `FREE_BYTES` of each body; `largest` is the most of
        one body, and not more."""
        self._most = max_bytes - largest  #: what is left is the way out
        self._favoured: Share | None = None  #: who has the way out
        self._turn = asyncio.Lock()  #: first come, first served
        self._freed = asyncio.Event()
        self._num_waiting = 0
        self._arriving: set[Share] = set()
        self.turns = Turns(PIECES_A_TURN)
        self.drops = Turns(PIECES_A_TURN)  #: of bodies that are refused: they hold up no others
        self.held = 0

    @contextmanager
    def share(self) -> Iterator[Share]:
        """The room of one body, for as long as it is read or worked on."""
        share = Share(self)
        try:
            yield share
        finally:
            share.give_back()

    @property
    def is_short(self) -> bool:
        """Whether anybody waits for room."""
        return self._num_waiting > 0

    async def take(self, share: Share, num: int) -> None:
        """Returns when `num` further bytes of this body may be held."""
        if share is not self._favoured and (self._turn.locked() or not self._admits(share, num)):
            await self._wait(share, num)
        self.held += num

    async def _wait(self, share: Share, num: int) -> None:
        with self._hurry():
            async with self._turn:
                while not self._admits(share, num):
                    self._freed.clear()
                    await self._freed.wait()

    def _admits(self, share: Share, num: int) -> bool:
        if self.held + num <= self._most:
            return True
        if self._favoured is None:
            self._favoured = share
        return share is self._favoured

    def give_back(self, share: Share, num: int) -> None:
        self.held -= num
        if share is self._favoured:
            self._favoured = None
        self._freed.set()

    @contextmanager
    def arriving(self, share: Share) -> Iterator[None]:
        self._arriving.add(share)
        try:
            yield
        finally:
            self._arriving.discard(share)

    @contextmanager
    def _hurry(self) -> Iterator[None]:
        self._num_waiting += 1
        if self._num_waiting == 1:
            self._tell_all()
        try:
            yield
        finally:
            self._num_waiting -= 1
            if self._num_waiting == 0:
                self._tell_all()

    def _tell_all(self) -> None:
        for share in self._arriving:
            share.heed_time()


class Share:
    """The room of one body."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._size = 0  #: what has come
        self._held = 0  #: what of it counts
        self._waited_s = 0.0
        self._limit = asyncio.timeout(None)
        now = asyncio.get_running_loop().time()
        self._end = now + READ_TIMEOUT_S
        self._slack_ends = {False: now + PATIENT_S, True: now + HURRIED_S}  #: by `is_short`
        self.is_hurried = False  #: as it was when the limit ended it, if it did

    @asynccontextmanager
    async def arriving(self) -> AsyncIterator[None]:
        """Inside, the body is read. Raises `TimeoutError` if it comes too slowly."""
        async with self._limit:
            with self._room.arriving(self):
                self.heed_time()
                yield

    def came(self, num: int) -> None:
        """So many more bytes have arrived."""
        now = asyncio.get_running_loop().time()
        self._size += num
        for is_short, slack_s in ((False, PATIENT_S), (True, HURRIED_S)):
            earned = self._slack_ends[is_short] + num / MIN_BYTES_PER_S
            self._slack_ends[is_short] = min(earned, now + slack_s)
        self.heed_time()

    async def keep(self) -> None:
        """Returns as soon as there is room for what has come. Raises `Busy`."""
        num = self._size - FREE_BYTES - self._held
        if num <= 0:
            return
        try:
            with self._standing_still():
                await self._room.turns.come()
                await self._take(num)
        except TimeoutError:
            raise Busy("There is no room for a body of this size now. Try again.") from None
        self._held += num

    async def drop(self) -> None:
        """Returns when a further piece of this body, which is refused, may be dropped."""
        with self._standing_still():
            await self._room.drops.come()

    async def _take(self, num: int) -> None:
        now = asyncio.get_running_loop().time
        began = now()
        async with asyncio.timeout(WAIT_S - self._waited_s):
            await self._room.take(self, num)
        self._waited_s += now() - began

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        """Inside, it is not the sender who is slow."""
        now = asyncio.get_running_loop().time
        began, end, slack_ends = now(), self._end, self._slack_ends
        self._end, self._slack_ends = math.inf, {False: math.inf, True: math.inf}
        self.heed_time()
        try:
            yield
        finally:
            waited_s = now() - began
            self._end = end + waited_s
            self._slack_ends = {key: at + waited_s for key, at in slack_ends.items()}
            self.heed_time()

    def give_back(self) -> None:
        self._room.give_back(self, self._held)
        self._held = 0

    def heed_time(self) -> None:
        """See to it that the reading ends when its time is over."""
        if not self._limit.expired():
            self.is_hurried = self._room.is_short
            at = min(self._end, self._slack_ends[self.is_hurried])
            self._limit.reschedule(at if at < math.inf else None)
