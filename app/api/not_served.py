"""Calls of OpenAI's and Anthropic's clients that are not served here, and what does it instead.

`docs/openai.md` and `docs/anthropic.md` tell which methods of these clients are served. Pure, but
for what a route may ask.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

from fastapi import Request
from starlette.exceptions import HTTPException

from app.api.envelopes import Door, door_of

PLAIN: Final = "This call is not served here; /docs shows those that are."

_TEXT_ALONE: Final = "models here read and write text alone"
_GO_ON: Final = "POST /v1/responses goes on from another response by previous_response_id"
_KEYS: Final = "`gristmill keys` makes keys, and GET /v1/usage sums what jobs took and cost"
_INSTEAD: Final = {
    "DELETE models": "models are configured, and no call deletes them",
    "POST responses/compact": 'truncation="auto" leaves out the oldest turns of what is too long',
    "assistants": _GO_ON,
    "audio": _TEXT_ALONE,
    "conversations": _GO_ON,
    "fine_tuning": "models are trained elsewhere, and configured here",
    "images": _TEXT_ALONE,
    "moderations": "POST /v1/classify asks a classifier",
    "organization": _KEYS,
    "organizations": _KEYS,
    "projects": _KEYS,
    "realtime": _TEXT_ALONE,
    "threads": _GO_ON,
    "uploads": "POST /v1/files takes a file whole, as a stream",
    "videos": _TEXT_ALONE,
}
"""By the first words behind /v1/, with a method where another one is served."""


def instead(method: str, path: str) -> str | None:
    """What does what such a call is for, if that can be said; None for any other call."""
    words = path.removeprefix("/v1/").split("/")
    for told in (f"{method} {'/'.join(words[:2])}", f"{method} {words[0]}", words[0]):
        if (found := _INSTEAD.get(told)) is not None:
            return found
    return None


async def openai_alone(request: Request) -> None:
    """Raises 404 for Anthropic's clients: a dependency of routes whose paths both have, each for
    objects of its own."""
    if door_of(request.url.path, request.headers) is Door.ANTHROPIC:
        raise HTTPException(HTTPStatus.NOT_FOUND)
