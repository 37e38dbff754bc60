"""Bodies of files: as they arrive, at a pace, and few at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from fastapi import Request
from starlette.exceptions import HTTPException

from app.api.wire.raw_bodies import DRAIN_BYTES
from app.errors import Busy, GristmillError

MIN_BYTES_PER_S: Final = 50_000
PATIENCE_S: Final = 30.0
"""An upload that is slower than this, beside so much time, is given up."""


@asynccontextmanager
async def arriving(request: Request) -> AsyncIterator[AsyncIterator[bytes]]:
    """The body as it arrives, at `MIN_BYTES_PER_S` at least. Of one that is refused some more is
    taken off the wire: a client that is cut off while it sends often loses the answer."""
    stream = request.stream()
    try:
        yield _in_time(stream)
    except GristmillError:
        dropped = 0
        async for data in _in_time(stream):
            dropped += len(data)
            if dropped > DRAIN_BYTES:
                break
        raise


async def _in_time(stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    until = loop.time() + PATIENCE_S
    while True:
        try:
            async with asyncio.timeout_at(until):
                data = await anext(stream, None)
        except TimeoutError:
            close = {"Connection": "close"}
            raise HTTPException(408, "The body did not arrive in time.", close) from None
        if data is None:
            return
        # What is taken meanwhile, by the storage say, is not the sender's time.
        until = max(until, loop.time()) + len(data) / MIN_BYTES_PER_S
        yield data


class Uploads:
    """How many there are at once: each holds a part of its file."""

    def __init__(self, most: int) -> None:
        self._left = most

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Raises `Busy` if there are too many."""
        if self._left <= 0:
            raise Busy("Too many files are being uploaded. Try again.")
        self._left -= 1
        try:
            yield
        finally:
            self._left += 1
