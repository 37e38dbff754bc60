"""Calls that are answered when their job has ended: chat, completions, embeddings, and vLLM's.

Each is a job like all others, with this call's url and body; see `app.api.live`.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from app.api import live
from app.api.answers import JSON
from app.api.caller import Caller, Who
from app.api.envelopes import Door
from app.api.live import Understood
from app.api.openapi import json_body
from app.api.problems import documented
from app.api.schemas import Job
from app.api.services import Here, Services
from app.requests.bodies import BODIES, Url

router = APIRouter(tags=["openai"])

_TIERS: Final = {"auto": "default", "fast": "priority"}
"""What OpenAI's service answers for those that it knows by another name."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What of a body is the door's own affair."""

    service_tier: str | None

    @property
    def tier(self) -> str | None:
        return self.service_tier and _TIERS.get(self.service_tier, self.service_tier)


def understood(url: Url, body: dict[str, Any]) -> Understood[Asked]:
    tier = body.get("service_tier")
    asked = Asked(tier if isinstance(tier, str) else None)
    return Understood({"url": url, "body": body}, asked)


async def _answer(request: Request, here: Services, who: Caller, url: Url) -> Response:
    job, asked = await live.read(request, here, who, lambda body: understood(url, body))
    placed = await live.place(request, here, job)
    ended = await live.ended(request, here, placed)
    return Response(to_json(answer_of(ended, asked)), media_type=JSON)


def answer_of(job: Job, asked: Asked) -> dict[str, Any]:
    """The response of a completed job, with what the caller hears again of its own."""
    response = dict(job.response or {})
    if asked.tier is not None:
        response["service_tier"] = asked.tier
    return response


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
_OBJECT: Final = {"application/json": {"schema": {"type": "object"}}}


def _described(url: Url, example: dict[str, Any], answer: str) -> dict[str, Any]:
    return {
        "path": url,
        "responses": {200: {"description": answer, "content": _OBJECT}} | _ERRORS,
        "openapi_extra": json_body(BODIES[url], example),
        "response_model": None,
    }


@router.post(
    **_described(
        Url.CHAT,
        {"messages": [{"role": "user", "content": "What is a grist mill?"}], "max_tokens": 64},
        "A chat.completion.",
    ),
    summary="Chat",
)
async def chat(request: Request, here: Here, who: Who) -> Response:
    """Answer a conversation, as OpenAI's call of the same path does."""
    return await _answer(request, here, who, Url.CHAT)


@router.post(
    **_described(
        Url.COMPLETIONS, {"prompt": "A grist mill is", "max_tokens": 32}, "A text_completion."
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
