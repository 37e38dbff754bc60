"""Reading a JSON body: bounded before it is parsed, and refused where it is not plain JSON."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from fastapi import Request
from pydantic import BaseModel
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from app.api.wire.room import Room, Share
from app.errors import Busy, RequestError, RequestTooLarge
from app.requests import json_text

DRAIN_BYTES: Final = 16_000_000
"""How much of a body that is refused is still taken off the wire, and dropped: a client that is cut
off while it sends often loses the answer that tells it why."""

_CLOSE: Final = {"Connection": "close"}  # there may be more of the body under way


@asynccontextmanager
async def body_of(request: Request, max_bytes: int, room: Room) -> AsyncIterator[bytearray]:
    """The body as sent, at most `max_bytes` long however it is framed, and its room in the block.

    Raises `RequestTooLarge`, or `Busy` if there is no room for it, or an `HTTPException` with 415
    for a body that is compressed (so a bomb is never unpacked) or not declared as JSON (so a form
    on a foreign web page cannot submit), with 408 for one that does not arrive. The connection is
    to be closed after any of these.
    """
    with room.share() as share:
        try:
            async with share.arriving():
                body = await _read(request, max_bytes, share)
        except TimeoutError:
            await room.turns.come()  # those that stood still together end together
            if share.is_hurried:
                raise Busy("The body came slowly while others waited for room.") from None
            raise HTTPException(408, "The body did not arrive in time.", _CLOSE) from None
        yield body


async def _read(request: Request, max_bytes: int, share: Share) -> bytearray:
    refused: Exception | None = _refused_unread(request)
    body = bytearray()
    size = dropped = 0
    async for chunk in request.stream():
        size += len(chunk)
        share.came(len(chunk))
        if size > max_bytes and not refused:
            most = f"The body is larger than the {max_bytes} bytes taken here."
            refused = RequestTooLarge(most)
        if not refused:
            try:
                await share.keep()
                body += chunk
            except Busy as error:
                refused = error
        if refused:
            body.clear()
            share.give_back()
            dropped += len(chunk)
            await share.drop()
            if dropped > DRAIN_BYTES:
                break
    if refused:
        raise refused
    return body


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


def parse_json(raw: bytes | bytearray, param: str = "body") -> object:
    """The value that a body, or the part of one at `param`, spells.

    NaN and Infinity are read here, and refused by the field that holds them: its name helps more
    than a column. Raises `RequestError` for anything that is not one JSON value, or that has far
    too much in it.
    """
    json_text.refuse_crowded(raw)
    try:
        return from_json(raw)
    except ValueError as error:  # its text holds a reason and a place, never the input
        what = "The body" if param == "body" else param
        raise RequestError(f"{what} is not valid JSON: {error}.", param=param) from None


def json_body(schema: type[BaseModel], example: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI of a body that the handler reads itself, within a limit."""
    told = {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}, "example": example}
    return {"requestBody": {"required": True, "content": {"application/json": told}}}
