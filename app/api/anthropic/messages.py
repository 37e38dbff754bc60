"""/v1/messages: answered when its job has ended, or told as it comes; see `app.api.live.calls`."""

from __future__ import annotations

from functools import partial
from http import HTTPStatus
from typing import Any, Final

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from app.api.answers import described, json_of
from app.api.anthropic.telling import teller_of
from app.api.caller import Who, WhoReads
from app.api.envelopes import Door
from app.api.live import calls
from app.api.live.calls import Understood
from app.api.live.streams import stream
from app.api.problems import documented
from app.api.services import Here
from app.api.wire.raw_bodies import json_body
from app.errors import RequestError
from app.requests.bodies import Url
from app.requests.messages import MessagesBody

router = APIRouter(prefix="/v1/messages", tags=["anthropic"])

_EXAMPLE: Final = {
    "max_tokens": 64,
    "messages": [{"role": "user", "content": "What is a grist mill?"}],
}
_READ_ERRORS: Final = documented(
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.SERVICE_UNAVAILABLE,
    door=Door.ANTHROPIC,
)
_ERRORS: Final = _READ_ERRORS | documented(
    HTTPStatus.CONFLICT,
    HTTPStatus.UNPROCESSABLE_ENTITY,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.GATEWAY_TIMEOUT,
    door=Door.ANTHROPIC,
)


class TokensCount(BaseModel):
    input_tokens: int = Field(description="Tokens of the prompt, by the model.", examples=[17])


def understood(body: dict[str, Any]) -> Understood[bool]:
    """What `Submitter.check` takes, and whether it is to be told as it comes."""
    body = dict(body)
    is_streamed = body.pop("stream", None) or False
    if not isinstance(is_streamed, bool):
        raise RequestError("stream must be true or false.", param="stream")
    submission = {"url": Url.MESSAGES, "body": body, "stream_events": is_streamed}
    return Understood(submission, is_streamed)


@router.post(
    "",
    **described("A message; with `stream` its events.", _ERRORS, is_streamable=True),
    openapi_extra=json_body(MessagesBody, _EXAMPLE),
    summary="Messages",
)
async def create(request: Request, here: Here, who: Who) -> Response:
    """Answer a conversation, as Anthropic's call of the same path does."""
    job, is_streamed = await calls.read(request, here, who, understood)
    placed = await calls.place(request, here, job)
    if is_streamed:
        return await stream(request, here, job, placed, partial(teller_of, job, placed.id))
    ended = await calls.ended(request, here, placed)
    return json_of(ended.response)


@router.post(
    "/count_tokens",
    responses=_READ_ERRORS,
    openapi_extra=json_body(MessagesBody, _EXAMPLE),
    summary="Count the tokens of messages",
)
async def count_tokens(request: Request, here: Here, who: WhoReads) -> TokensCount:
    """How many tokens the prompt of such a call has, as its model counts them. `max_tokens` may be
    left out; nothing is stored."""
    job, _ = await calls.read(
        request, here, who, lambda body: understood(body | {"max_tokens": 1, "stream": False})
    )
    return TokensCount(input_tokens=job.input_tokens or 0)
