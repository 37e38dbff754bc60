"""One error shape for every answer that is not a success: RFC 9457 `application/problem+json`.

`code` is stable and for programs, `detail` is for people, `param` names the wrong field. None of
them ever holds a prompt.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from app import errors

log = logging.getLogger(__name__)

STATUS: Final[dict[type[errors.GristmillError], HTTPStatus]] = {
    errors.RequestError: HTTPStatus.BAD_REQUEST,
    errors.ModelNotFound: HTTPStatus.NOT_FOUND,
    errors.UrlNotFound: HTTPStatus.NOT_FOUND,
    errors.ContextLengthExceeded: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.InvalidSchema: HTTPStatus.BAD_REQUEST,
    errors.DeadlinePassed: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.RequestTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.IdempotencyConflict: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.JobNotFound: HTTPStatus.NOT_FOUND,
    errors.JobStateConflict: HTTPStatus.CONFLICT,
    errors.RequestRemoved: HTTPStatus.GONE,
    errors.ResponseRemoved: HTTPStatus.GONE,
    errors.NotStorable: HTTPStatus.BAD_REQUEST,
    errors.QueueFull: HTTPStatus.TOO_MANY_REQUESTS,
    errors.Busy: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.SchemaError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.JobUnreadable: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.GristmillError: HTTPStatus.INTERNAL_SERVER_ERROR,
}
RETRY_AFTER_UNAVAILABLE_S: Final = 5
_TRY_AGAIN: Final = (
    "The database cannot serve this right now. Try again: with an Idempotency-Key that cannot make "
    "a second job. The operator finds more under /readyz."
)
_SEE_THE_LOG: Final = "Something went wrong here. The operator finds it in the log by request_id."
_OURS: Final = {
    HTTPStatus.SERVICE_UNAVAILABLE: _TRY_AGAIN,
    HTTPStatus.INTERNAL_SERVER_ERROR: _SEE_THE_LOG,
}
_COME_BACK: Final = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})


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
    request_id: str | None = Field(
        None,
        description="The `x-request-id` of this answer, for finding it in the logs.",
        examples=["0199e0a4f4a97c53a7b3a9f5d8f6d2ce"],
    )


class ProblemResponse(Response):
    media_type = "application/problem+json"


def describe(error: errors.GristmillError, *, instance: str) -> Problem:
    """The problem that tells of `error`, which came up at the path `instance`.

    What is no fault of the caller is told in general words: its own text names our servers.
    """
    status = _status(error)
    is_told = isinstance(error, errors.Busy)
    return Problem(
        type=f"urn:gristmill:problem:{error.code}",
        title=(type(error).__doc__ or "").split(".")[0],
        status=status,
        detail=error.message if is_told else _OURS.get(status, error.message),
        instance=instance,
        code=error.code,
        param=getattr(error, "param", None),
    )


def respond(
    problem: Problem, request: Request, headers: dict[str, str] | None = None
) -> ProblemResponse:
    """The answer that carries a problem. One that may pass says when to come back."""
    told = problem.model_copy(update={"request_id": getattr(request.state, "request_id", None)})
    pause = {"Retry-After": str(RETRY_AFTER_UNAVAILABLE_S)} if problem.status in _COME_BACK else {}
    return ProblemResponse(
        told.model_dump_json(exclude_none=True),
        status_code=problem.status,
        headers=pause | (headers or {}),
    )


def install(app: FastAPI) -> None:
    """Let every error of the app leave as a problem."""
    app.add_exception_handler(errors.GristmillError, _on_gristmill_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_wrong_parameter)


def internal_error(request: Request) -> ProblemResponse:
    """The answer to a bug of ours; it tells nothing but the id to look for."""
    return respond(describe(errors.GristmillError(), instance=request.url.path), request)


def too_many_fields(request: Request) -> Response:
    """The answer to a head with more fields than are taken."""
    status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    detail = "The request has too many header fields."
    return _on_http_exception(request, HTTPException(status, detail, {"Connection": "close"}))


def _on_gristmill_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.GristmillError)
    problem = describe(error, instance=request.url.path)
    headers: dict[str, str] = {}
    if isinstance(error, errors.QueueFull):
        headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, errors.Busy):  # there may be more of its body under way
        headers |= {"Retry-After": str(error.retry_after), "Connection": "close"}
    elif isinstance(error, errors.RequestTooLarge):
        headers["Connection"] = "close"  # there may be more of it under way
    elif isinstance(error, errors.JobStateConflict):
        headers["x-should-retry"] = "false"  # the OpenAI and Anthropic clients retry every 409
    elif problem.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.warning("%s", error, extra={"action": "request_failed", "code": error.code})
    return respond(problem, request, headers)


def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refused(request, error)


def refused(request: Request, error: HTTPException) -> ProblemResponse:
    """The answer to a request that no route has served."""
    status = HTTPStatus(error.status_code)
    code = status.name.lower()
    problem = Problem(
        type=f"urn:gristmill:problem:{code}",
        title=status.phrase,
        status=status,
        detail=_DETAILS.get(status, error.detail),
        instance=request.url.path,
        code=code,
    )
    return respond(problem, request, dict(error.headers or {}))


_DETAILS: Final = {
    HTTPStatus.NOT_FOUND: "There is nothing at this path; /docs shows what there is.",
    HTTPStatus.METHOD_NOT_ALLOWED: "This path does not take this method; /docs shows what it does.",
}


def _on_wrong_parameter(request: Request, error: Exception) -> Response:
    """A wrong query or path parameter: 400 like a wrong field, never FastAPI's own 422."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:])
    wrong = errors.RequestError(f"{param}: {first['msg']}.", param=param)
    return respond(describe(wrong, instance=request.url.path), request)


def _status(error: errors.GristmillError) -> HTTPStatus:
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


RESPONSES: Final[dict[HTTPStatus, str]] = {
    HTTPStatus.BAD_REQUEST: "Broken JSON, an unknown field or parameter, a wrong type or a value "
    "out of range.",
    HTTPStatus.UNAUTHORIZED: "A token is set, and it is not sent.",
    HTTPStatus.FORBIDDEN: "A web page of another origin asks, or the key lacks the scope for this.",
    HTTPStatus.NOT_FOUND: "No such job, model or url.",
    HTTPStatus.CONFLICT: "The job's state does not allow this. Not to be retried.",
    HTTPStatus.GONE: "The job's request is not kept any more.",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "The body is larger than allowed.",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "The body is not plain `application/json`.",
    HTTPStatus.UNPROCESSABLE_ENTITY: "Well formed, and yet it cannot run: too long for the model's "
    "context, a deadline in the past, an Idempotency-Key used for another request.",
    HTTPStatus.MISDIRECTED_REQUEST: "The Host is a name that `api.allowed_hosts` does not have.",
    HTTPStatus.TOO_MANY_REQUESTS: "The queue is full; `Retry-After` says when to try again.",
    HTTPStatus.SERVICE_UNAVAILABLE: "Postgres cannot be reached, or too much is in hand here; "
    "`Retry-After` says when to try again.",
}


def documented(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries of the errors that a route may answer."""
    return {
        int(status): {
            "description": RESPONSES[status],
            "content": {
                "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
            },
        }
        for status in statuses
    }
