"""A file of what came in the body of a call: the requests of a batch that brings them along."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from app.api.services import Services
from app.files import Purpose, key_of
from app.jobs import new_id
from app.store import files
from app.store.isolation import Connection

NAME: Final = "requests.jsonl"
PIECE: Final = 200
"""Requests that are written down in one turn."""

LineOf = Callable[[bytes, int], bytes]
"""A request and its number, from 1 on, as a line without its end. Runs in a thread."""


@dataclass(slots=True)
class InlineFile:
    """It is in the storage; its row is to be made `ready` with that of its batch."""

    id: UUID
    bytes: int
    sha256: str
    is_used: bool = False  #: or else it is dropped

    def ready(self, connection: Connection, expires_s: float) -> None:
        files.ready(
            connection,
            self.id,
            num_bytes=self.bytes,
            sha256=self.sha256,
            purpose=Purpose.BATCH,
            filename=NAME,
            expires_s=expires_s,
        )


@asynccontextmanager
async def written(
    here: Services, tenant: str, raw: bytearray, items: Sequence[slice], line_of: LineOf
) -> AsyncIterator[InlineFile]:
    """The items of a body as a file, a line each. It is dropped unless it is `is_used` then.

    Raises what `line_of` does, and `StorageUnavailable`.
    """
    file_id, digest, num_bytes = new_id(), hashlib.sha256(), 0
    await here.commit(files.begin, file_id, tenant=tenant, purpose=Purpose.BATCH, filename=NAME)
    is_used = False
    try:
        async with here.objects.writing_async(key_of(file_id)) as writer:
            async for piece in _pieces(here, raw, items, line_of):
                digest.update(piece)
                num_bytes += len(piece)
                await writer.write(piece)
        file = InlineFile(file_id, num_bytes, digest.hexdigest())
        yield file
        is_used = file.is_used
    finally:
        if not is_used:
            here.later(here.commit(files.give_up, file_id))


async def _pieces(
    here: Services, raw: bytearray, items: Sequence[slice], line_of: LineOf
) -> AsyncIterator[bytes]:
    for start in range(0, len(items), PIECE):
        part = items[start : start + PIECE]
        size = part[-1].stop - part[0].start
        yield await here.work.run(size, _piece, raw, part, start, line_of)


def _piece(raw: bytearray, part: Sequence[slice], start: int, line_of: LineOf) -> bytes:
    return b"".join(
        line_of(bytes(raw[item]), number) + b"\n" for number, item in enumerate(part, start + 1)
    )
