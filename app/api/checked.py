"""Bodies of calls that take a few fields: read, and checked against their model."""

from __future__ import annotations

import json
from typing import Final, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from app.api import raw_bodies
from app.api.services import Services
from app.errors import RequestError

MAX_BYTES: Final = 300_000
"""A thousand ids of 255 characters, and some more: little enough for the event loop to look at."""

M = TypeVar("M", bound=BaseModel)


async def read(request: Request, here: Services, model: type[M]) -> M:
    """The body as a `model`. Raises `RequestError` for the first thing that is wrong with it."""
    most = min(MAX_BYTES, here.settings.api.max_body_bytes)
    async with raw_bodies.body_of(request, most, here.room) as raw:
        return parse(raw, model)


def parse(raw: bytes | bytearray, model: type[M]) -> M:
    value = raw_bodies.parse_json(raw)
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object.", param="body")
    for name in value:
        if name not in model.model_fields:  # before others are looked at: there may be many
            raise _unknown(name)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _first(error) from None


def _first(error: ValidationError) -> RequestError:
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = _printable(".".join(map(str, problem["loc"])) or "body")
    if problem["type"] == "extra_forbidden":
        return _unknown(param)
    if problem["type"] == "missing":
        return RequestError(f"The field {param} is required.", param=param)
    reason = problem["msg"].removeprefix("Value error, ")
    return RequestError(f"{param}: {reason}.", param=param)


def _unknown(name: str) -> RequestError:
    param = _printable(name)
    return RequestError(f"Unknown field {param}.", param=param)


def _printable(name: str) -> str:
    return json.dumps(name)[1:-1][:200]
