"""Bodies of calls that take a few fields: read, and checked against their model."""

from __future__ import annotations

from typing import Final, TypeVar

from fastapi import Request
from pydantic import ValidationError

from app.api.services import Services
from app.api.wire import raw_bodies
from app.errors import RequestError
from app.requests.part import Part
from app.requests.problems import first_problem

MAX_BYTES: Final = 300_000
"""A thousand ids of 255 characters, and some more: little enough for the event loop to look at."""

M = TypeVar("M", bound=Part)


async def read(request: Request, here: Services, model: type[M]) -> M:
    """The body as a `model`. Raises `RequestError` for the first thing that is wrong with it."""
    most = min(MAX_BYTES, here.settings.api.max_body_bytes)
    async with raw_bodies.body_of(request, most, here.room) as raw:
        return parse(raw, model)


def parse(raw: bytes | bytearray, model: type[M]) -> M:
    value = raw_bodies.parse_json(raw)
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object.", param="body")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise first_problem(error, value) from None
