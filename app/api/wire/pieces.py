"""Bodies of answers that are read piece by piece."""

from __future__ import annotations

from collections.abc import AsyncIterator


async def begun(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same, once the first piece is there: a storage that is away is an error, and not half an
    answer."""
    first = await anext(pieces, b"")

    async def all_of_it() -> AsyncIterator[bytes]:
        yield first
        async for piece in pieces:
            yield piece

    return all_of_it()
