"""The shapes in which errors leave: each path is of one door, and its clients know one shape.

    /v1/jobs, /v1/usage …      ours: RFC 9457 `application/problem+json`
    /v1/messages …             Anthropic's: {"type": "error", "error": {…}, "request_id"}
    everything else in /v1     OpenAI's: {"error": {"message", "type", "param", "code"}}

Whatever the path is, a call with the header `anthropic-version` is of Anthropic's clients: both
have /v1/models. Pure.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final, Literal

from pydantic import BaseModel, Field
from pydantic_core import to_json


class Door(enum.Enum):
    """Whose protocol a call speaks."""

    OWN = "own"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"


OWN: Final = frozenset({"jobs", "usage", "limits", "webhook_deliveries", "webhook_secret"})
"""First words of our own paths behind /v1/; what is served by no one is answered as to OpenAI's
clients, who ask for more than there is here."""


def door_of(path: str, headers: Mapping[str, str]) -> Door:
    """`headers` by names in any case."""
    root, _, rest = path.lstrip("/").partition("/")
    first = rest.partition("/")[0]
    if root != "v1" or first in OWN:
        return Door.OWN
    if first == "messages" or "anthropic-version" in headers:
        return Door.ANTHROPIC
    return Door.OPENAI


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str = Field(
        description="Identifies the kind of problem.",
        examples=["urn:gristmill:problem:model_not_found"],
    )
    title: str = Field(
        description="The kind of problem in a few words.", examples=["No such model is configured"]
    )
    status: int = Field(description="The HTTP status.", examples=[404])
    detail: str = Field(
        description="What is wrong here and what to do.",
        examples=["No model 'gpt-9'. One of: smollm2-135m-instruct."],
    )
    instance: str = Field(description="The path that was called.", examples=["/v1/jobs"])
    code: str = Field(
        description="The kind of problem for programs; stable.", examples=["model_not_found"]
    )
    param: str | None = Field(
        None, description="The field or parameter that is wrong.", examples=["body.model"]
    )
    violated_policies: list[str] | None = Field(
        None,
        serialization_alias="violated-policies",
        description="The limits of the tenant that were reached.",
        examples=[["max_open_jobs"]],
    )
    request_id: str | None = Field(
        None,
        description="The `x-request-id` of this answer, for finding it in the logs.",
        examples=["0199e0a4f4a97c53a7b3a9f5d8f6d2ce"],
    )


class OpenAIProblem(BaseModel):
    """What is wrong, as OpenAI's clients read it."""

    message: str = Field(
        description="What is wrong here and what to do.", examples=["No model 'gpt-9'."]
    )
    type: str = Field(description="Whose fault it is.", examples=["invalid_request_error"])
    param: str | None = Field(description="The field that is wrong.", examples=["model"])
    code: str | None = Field(
        description="The kind of problem for programs; stable.", examples=["model_not_found"]
    )


class OpenAIError(BaseModel):
    """An error on a path of OpenAI's protocol."""

    error: OpenAIProblem = Field(description="What is wrong.")


class AnthropicProblem(BaseModel):
    """What is wrong, as Anthropic's clients read it."""

    type: str = Field(description="The kind of problem.", examples=["invalid_request_error"])
    message: str = Field(
        description="What is wrong here and what to do.", examples=["No model 'gpt-9'."]
    )
    details: dict[str, Any] | None = Field(
        None,
        exclude_if=lambda given: given is None,
        description="What its clients act on by themselves.",
        examples=[{"error_code": "thread_unsupported_request", "unsupported": ["thread"]}],
    )


class AnthropicError(BaseModel):
    """An error on a path of Anthropic's protocol."""

    type: Literal["error"] = Field("error", description="Always `error`.")
    error: AnthropicProblem = Field(description="What is wrong.")
    request_id: str | None = Field(description="The `request-id` of this answer.", examples=["1f"])


SCHEMAS: Final[dict[Door, type[BaseModel]]] = {
    Door.OWN: Problem,
    Door.OPENAI: OpenAIError,
    Door.ANTHROPIC: AnthropicError,
}

_WRONG: Final = frozenset({"context_length_exceeded", "deadline_passed"})
"""Problems of a request that are 422 to us and 400 to the others."""

OVERLOADED: Final = 529
"""What Anthropic's clients know 503 as."""


def status_at(door: Door, problem: Problem) -> int:
    """The status that this problem is answered with."""
    if door is not Door.OWN and problem.code in _WRONG:
        return HTTPStatus.BAD_REQUEST
    if door is Door.ANTHROPIC and problem.status == HTTPStatus.SERVICE_UNAVAILABLE:
        return OVERLOADED
    return problem.status


def media_type_of(door: Door) -> str:
    return "application/problem+json" if door is Door.OWN else "application/json"


def written(door: Door, problem: Problem) -> bytes:
    """The body of the answer."""
    match door:
        case Door.OWN:
            return problem.model_dump_json(exclude_none=True, by_alias=True).encode()
        case Door.OPENAI:
            return to_json(openai(problem))
        case Door.ANTHROPIC:
            return to_json(anthropic(problem))


def openai(problem: Problem) -> dict[str, Any]:
    """As OpenAI's clients read it, in an answer and in a stream; all four fields are always there.

    https://platform.openai.com/docs/guides/error-codes
    """
    told = OpenAIProblem(
        message=problem.detail,
        type=_openai_type(problem),
        param=problem.param and problem.param.removeprefix("body."),
        code=_OPENAI_CODES.get(problem.code, problem.code),
    )
    return OpenAIError(error=told).model_dump()


_OPENAI_CODES: Final[dict[str, str | None]] = {
    "invalid_request": None,
    "bad_request": None,
    "not_found": "unknown_url",
    "unauthorized": "invalid_api_key",
    "queue_full": "rate_limit_exceeded",
    "quota_exceeded": "rate_limit_exceeded",
    "internal_error": "server_error",
}


def _openai_type(problem: Problem) -> str:
    if problem.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return "server_error"
    if problem.status == HTTPStatus.TOO_MANY_REQUESTS:
        return problem.code if problem.code == "insufficient_quota" else "rate_limit_error"
    return "invalid_request_error"


def anthropic(problem: Problem) -> dict[str, Any]:
    """As Anthropic's clients read it, in an answer and in a stream.

    https://docs.claude.com/en/api/errors
    """
    told = AnthropicProblem(
        type=_anthropic_type(problem),
        message=_named(problem),
        details=_DETAILS.get(problem.param or ""),
    )
    return AnthropicError(error=told, request_id=problem.request_id).model_dump()


_DETAILS: Final = {
    "body.thread": {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
}
"""By the field that is wrong: on this Anthropic's client sends the whole conversation instead,
where it may, as its tool runner does by itself."""


def _named(problem: Problem) -> str:
    """The message, with the field that is wrong: there is no place of its own for it."""
    param = (problem.param or "").removeprefix("body.")
    return problem.detail if param in problem.detail else f"{param}: {problem.detail}"


_ANTHROPIC_TYPES: Final = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def _anthropic_type(problem: Problem) -> str:
    is_ours = problem.status >= HTTPStatus.INTERNAL_SERVER_ERROR
    default = "api_error" if is_ours else "invalid_request_error"
    return _ANTHROPIC_TYPES.get(problem.status, default)
