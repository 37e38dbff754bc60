"""Reading a JSON body: bounded before it is parsed, and refused where it is not plain JSON."""

from __future__ import annotations

import asyncio
from typing import Final

from fastapi import Request
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from app.errors import RequestError, RequestTooLarge
from app.requests import json_text

DRAIN_BYTES: Final = 16_000_000
"""How much of a body that is refused is still taken off the wire, and dropped: a client that is cut
off while it sends often loses the answer that tells it why."""

READ_TIMEOUT_S: Final = 60.0
"""How long a body may take to arrive."""

PATIENCE_S: Final = 10.0
MIN_BYTES_PER_S: Final = 100_000
"""After the first seconds a body must come at least this fast: one that drips is given up."""

_CLOSE: Final = {"Connection": "close"}  # there may be more of the body under way


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body as sent, at most `max_bytes` long however it is framed.

    Raises `RequestTooLarge`, or an `HTTPException` with 415 for a body that is compressed (so a
    bomb is never unpacked) or not declared as JSON (so a form on a foreign web page cannot submit),
    with 408 for one that does not arrive. The connection is to be closed after any of these.
    """
    refused = _refused_unread(request)
    room = 0 if refused else max_bytes
    chunks: list[bytes] = []
    size = 0
    began = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(min(PATIENCE_S, READ_TIMEOUT_S)) as limit:
            async for chunk in request.stream():
                size += len(chunk)
                earned_s = PATIENCE_S + size / MIN_BYTES_PER_S
                limit.reschedule(began + min(earned_s, READ_TIMEOUT_S))
                if size <= room:
                    chunks.append(chunk)
                elif size > room + DRAIN_BYTES:
                    break
    except TimeoutError:
        raise HTTPException(408, "The body did not arrive in time.", _CLOSE) from None
    if refused:
        raise refused
    if size > max_bytes:
        raise RequestTooLarge(f"The body is larger than the {max_bytes} bytes taken here.")
    return b"".join(chunks)


def _refused_unread(request: Request) -> HTTPException | None:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        return HTTPException(
            415,
            "Compressed bodies are not taken. Send the JSON as it is, without Content-Encoding.",
            {"Accept-Encoding": "identity"} | _CLOSE,
        )
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        return HTTPException(415, "Send the body with Content-Type: application/json.", _CLOSE)
    return None


def parse_json(raw: bytes) -> object:
    """The value that a body spells.

    NaN and Infinity are read here, and refused by the field that holds them: its name helps more
    than a column. Raises `RequestError` for anything that is not one JSON value, or that has far
    too much in it.
    """
    json_text.refuse_crowded(raw)
    try:
        return from_json(raw)
    except ValueError as error:  # its text holds a reason and a place, never the input
        raise RequestError(f"The body is not valid JSON: {error}.", param="body") from None
