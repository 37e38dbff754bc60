"""Reading a JSON body: bounded before it is parsed, and refused where it is not plain JSON."""

from __future__ import annotations

from typing import Final

from fastapi import Request
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from app.errors import RequestError, RequestTooLarge

DRAIN_BYTES: Final = 16_000_000
"""How much of a body that is too large is still taken off the wire. A client that is cut off
while it sends often loses the answer that tells it why."""


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body as sent, at most `max_bytes` long however it is framed.

    Raises `RequestTooLarge`, or an `HTTPException` with 415 for a body that is compressed (so a
    bomb is never unpacked) or not declared as JSON (so a form on a foreign web page cannot submit).
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise HTTPException(
            415,
            "Compressed bodies are not taken. Send the JSON as it is, without Content-Encoding.",
            {"Accept-Encoding": "identity"},
        )
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, "Send the body with Content-Type: application/json.")
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= max_bytes:
            chunks.append(chunk)
        elif size > max_bytes + DRAIN_BYTES:
            break
    if size > max_bytes:
        raise RequestTooLarge(f"The body is larger than the {max_bytes} bytes taken here.")
    return b"".join(chunks)


def parse_json(raw: bytes) -> object:
    """The value that a body spells.

    NaN and Infinity are read here, and refused by the field that holds them: its name helps more
    than a column. Raises `RequestError` for anything that is not one JSON value.
    """
    try:
        return from_json(raw)
    except ValueError as error:  # its text holds a reason and a place, never the input
        raise RequestError(f"The body is not valid JSON: {error}.", param="body") from None
