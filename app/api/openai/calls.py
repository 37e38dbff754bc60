"""Calls whose callers wait: chat, completions, embeddings, and vLLM's.

Each is a job like all others, with this call's url and body; see `app.api.live.calls`, and for
those that are told as they come `app.api.openai.streams`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, Final
from uuid import UUID

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError

from app.api.answers import described, json_of
from app.api.caller import Caller, Who
from app.api.envelopes import Door
from app.api.live import calls
from app.api.live.calls import Understood
from app.api.live.streams import stream
from app.api.openai.chunks import Chunks, Wanted
from app.api.openai.streams import ChunkTeller
from app.api.problems import documented
from app.api.services import Here, Services
from app.api.wire.raw_bodies import json_body
from app.engines.text.tokenizer import Tokenizer
from app.requests import bodies
from app.requests.bodies import BODIES, Url
from app.requests.part import DROP_UNKNOWN, Part
from app.requests.problems import first_problem
from app.store.submissions import NewJob

router = APIRouter(tags=["openai"])

_TIERS: Final = {"auto": "default", "fast": "priority"}
"""What OpenAI's service answers for those that it knows by another name."""


_STREAMED: Final = {Url.CHAT: ("chatcmpl", "chat.completion.chunk"),
                    Url.COMPLETIONS: ("cmpl", "text_completion")}  # fmt: skip
"""Calls that can be streamed: what their ids begin with, and what a chunk is called."""


class _Options(Part):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Streaming(Part):
    stream: bool = False
    stream_options: _Options = _Options()


@dataclass(frozen=True, slots=True)
class Asked:
    """What of a body is the door's own affair."""

    url: Url
    is_streamed: bool
    wanted: Wanted
    heard_again: dict[str, Any]


def understood(url: Url, body: dict[str, Any]) -> Understood[Asked]:
    """Raises `RequestError`."""
    heard = heard_again(body)
    asked = _Streaming()
    if url in _STREAMED:
        body = dict(body)
        asked = _streaming({name: body.pop(name, None) for name in _Streaming.model_fields})
    submission = {"url": url, "body": body, "stream_events": asked.stream}
    options = asked.stream_options
    wanted = Wanted(options.include_usage, options.continuous_usage_stats)
    return Understood(submission, Asked(url, asked.stream, wanted, heard))


def heard_again(body: Mapping[str, Any]) -> dict[str, Any]:
    """What an answer repeats of its request."""
    tier = body.get("service_tier")
    return {"service_tier": _TIERS.get(tier, tier)} if isinstance(tier, str) else {}


def _streaming(given: dict[str, Any]) -> _Streaming:
    try:
        return _Streaming.model_validate(given, context=DROP_UNKNOWN)
    except ValidationError as error:
        raise first_problem(error, given) from None


async def _answer(request: Request, here: Services, who: Caller, url: Url) -> Response:
    job, asked = await calls.read(request, here, who, partial(understood, url))
    placed = await calls.place(request, here, job)
    if asked.is_streamed:
        return await stream(request, here, job, placed, partial(_teller, job, placed.id, asked))
    ended = await calls.ended(request, here, placed)
    return json_of((ended.response or {}) | asked.heard_again)


def _teller(
    job: NewJob,
    job_id: UUID,
    asked: Asked,
    request: bodies.Request,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
) -> ChunkTeller:
    prefix, name = _STREAMED[asked.url]
    head = {
        "id": f"{prefix}-{job_id}",
        "object": name,
        "created": int(time.time()),
        "model": job.model,
        **asked.heard_again,
    }
    num_prompt_tokens = job.input_tokens or 0
    return ChunkTeller(Chunks(request, tokenizer, prompts, head, asked.wanted, num_prompt_tokens))


_ERRORS: Final = documented(
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.CONFLICT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    HTTPStatus.UNPROCESSABLE_ENTITY,
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
    door=Door.OPENAI,
)


def _described(url: Url, example: dict[str, Any], answer: str) -> dict[str, Any]:
    return {
        "path": url,
        "openapi_extra": json_body(BODIES[url], example),
        **described(answer, _ERRORS, is_streamable=url in _STREAMED),
    }


@router.post(
    **_described(
        Url.CHAT,
        {"messages": [{"role": "user", "content": "What is a grist mill?"}], "max_tokens": 64},
        "A chat.completion, or its chunks.",
    ),
    summary="Chat",
)
async def chat(request: Request, here: Here, who: Who) -> Response:
    """Answer a conversation, as OpenAI's call of the same path does."""
    return await _answer(request, here, who, Url.CHAT)


@router.post(
    **_described(
        Url.COMPLETIONS,
        {"prompt": "A grist mill is", "max_tokens": 32},
        "A text_completion, or its chunks.",
    ),
    summary="Complete a text",
)
async def completions(request: Request, here: Here, who: Who) -> Response:
    """Go on with a text, as OpenAI's call of the same path does."""
    return await _answer(request, here, who, Url.COMPLETIONS)


@router.post(
    **_described(Url.EMBEDDINGS, {"input": "water wheel"}, "A list of embeddings."),
    summary="Embed texts",
)
async def embeddings(request: Request, here: Here, who: Who) -> Response:
    """A vector for each text, as OpenAI's call of the same path gives them."""
    return await _answer(request, here, who, Url.EMBEDDINGS)


@router.post(
    **_described(
        Url.RERANK,
        {"query": "What is a grist mill?", "documents": ["A mill grinds grain.", "Tea is hot."]},
        "The documents' places and scores.",
    ),
    summary="Rerank documents",
)
async def rerank(request: Request, here: Here, who: Who) -> Response:
    """Documents in the order in which they fit a query, in the shape of vLLM and Jina."""
    return await _answer(request, here, who, Url.RERANK)


@router.post(
    **_described(
        Url.SCORE,
        {"text_1": "What is a grist mill?", "text_2": ["A mill grinds grain."]},
        "A score for each pair.",
    ),
    summary="Score pairs of texts",
)
async def score(request: Request, here: Here, who: Who) -> Response:
    """How well texts fit each other, in vLLM's shape."""
    return await _answer(request, here, who, Url.SCORE)


@router.post(
    **_described(Url.CLASSIFY, {"input": "The wheel turns again at last."}, "Scores of classes."),
    summary="Classify texts",
)
async def classify(request: Request, here: Here, who: Who) -> Response:
    """The classes of texts, in vLLM's shape."""
    return await _answer(request, here, who, Url.CLASSIFY)
