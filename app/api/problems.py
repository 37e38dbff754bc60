"""What every answer that is not a success tells, whatever its shape (`app.api.envelopes`).

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
from starlette.exceptions import HTTPException

from app import errors
from app.api import envelopes, not_served
from app.api.envelopes import Door, Problem, door_of

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
    errors.NoSuchFile: HTTPStatus.NOT_FOUND,
    errors.WebhookNotFound: HTTPStatus.NOT_FOUND,
    errors.WebhookConflict: HTTPStatus.CONFLICT,
    errors.WebhookRefused: HTTPStatus.BAD_REQUEST,
    errors.WebhookUnreachable: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.BatchNotFound: HTTPStatus.NOT_FOUND,
    errors.BatchStateConflict: HTTPStatus.CONFLICT,
    errors.BatchKeyConflict: HTTPStatus.CONFLICT,
    errors.JobStateConflict: HTTPStatus.CONFLICT,
    errors.RequestRemoved: HTTPStatus.GONE,
    errors.ResponseRemoved: HTTPStatus.GONE,
    errors.NotStorable: HTTPStatus.BAD_REQUEST,
    errors.QueueFull: HTTPStatus.TOO_MANY_REQUESTS,
    errors.Busy: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.StorageUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.Unavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.SchemaError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.NoWorker: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.Cancelled: HTTPStatus.CONFLICT,
    errors.TimedOut: HTTPStatus.GATEWAY_TIMEOUT,
    errors.Restarted: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.JobUnreadable: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.GristmillError: HTTPStatus.INTERNAL_SERVER_ERROR,
}
RETRY_AFTER_UNAVAILABLE_S: Final = 5
MAX_RETRY_AFTER_S: Final = 60
"""Of longer ones some clients give up at once, and others sleep that long."""
QUOTA_EXCEEDED: Final = "https://iana.org/assignments/http-problem-types#quota-exceeded"
"""draft-ietf-httpapi-ratelimit-headers registers it."""
DO_NOT_RETRY: Final = {"x-should-retry": "false"}
_TRIED: Final = (errors.EngineError, errors.AttemptsExhausted)
"""Ends of jobs that workers have tried again already, as far as that could help."""
_TOLD: Final = (
    *(errors.Busy, errors.NoWorker, errors.Restarted, errors.StorageUnavailable),
    *_TRIED,
)
"""Errors of ours whose own sentences are for callers."""
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


def describe(error: errors.GristmillError, *, instance: str) -> Problem:
    """The problem that tells of `error`, which came up at the path `instance`.

    What is no fault of the caller is told in general words: its own text names our servers.
    """
    status = _status(error)
    is_told = isinstance(error, _TOLD)
    if isinstance(error, errors.StorageUnavailable):
        error = errors.StorageUnavailable()  # without what the storage says
    is_quota = isinstance(error, errors.QuotaExceeded)
    return Problem(
        type=QUOTA_EXCEEDED if is_quota else f"urn:gristmill:problem:{error.code}",
        title=(type(error).__doc__ or "").split(".")[0],
        status=status,
        detail=error.message if is_told else _OURS.get(status, error.message),
        instance=instance,
        code=error.code,
        param=getattr(error, "param", None),
        violated_policies=[error.limit] if isinstance(error, errors.QuotaExceeded) else None,
    )


def respond(problem: Problem, request: Request, headers: dict[str, str] | None = None) -> Response:
    """The answer that carries a problem, in the shape of the door that was called. One that may
    pass says when to come back, and one that clients would repeat in vain that they should not."""
    told = problem.model_copy(update={"request_id": getattr(request.state, "request_id", None)})
    door = door_of(request.url.path, request.headers)
    given: dict[str, str] = {}
    if problem.status in _COME_BACK and not (headers or {}).keys() & DO_NOT_RETRY.keys():
        given["Retry-After"] = str(RETRY_AFTER_UNAVAILABLE_S)
    if problem.status == HTTPStatus.CONFLICT:  # OpenAI's and Anthropic's clients retry every one
        given |= DO_NOT_RETRY
    return Response(
        envelopes.written(door, told),
        envelopes.status_at(door, problem),
        given | (headers or {}),
        media_type=envelopes.media_type_of(door),
    )


def install(app: FastAPI) -> None:
    """Let every error of the app leave as a problem."""
    app.add_exception_handler(errors.GristmillError, _on_gristmill_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_wrong_parameter)


def internal_error(request: Request) -> Response:
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
    if isinstance(error, errors.QuotaExceeded) and not error.retry_after:
        headers |= DO_NOT_RETRY
    elif isinstance(error, errors.QueueFull | errors.Busy):
        headers["Retry-After"] = str(min(max(error.retry_after, 1), MAX_RETRY_AFTER_S))
    if isinstance(error, errors.Busy | errors.RequestTooLarge | errors.RateLimited):
        headers["Connection"] = "close"  # there may be more of its body under way
    elif isinstance(error, _TRIED):
        headers |= DO_NOT_RETRY
    elif problem.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        log.warning("%s", error, extra={"action": "request_failed", "code": error.code})
    return respond(problem, request, headers)


def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return refused(request, error)


def refused(request: Request, error: HTTPException) -> Response:
    """The answer to a request that no route has served."""
    status = HTTPStatus(error.status_code)
    detail = _DETAILS.get(status, error.detail)
    if status in _DETAILS and door_of(request.url.path, request.headers) is not Door.OWN:
        if (told := not_served.instead(request.method, request.url.path)) is not None:
            status, detail = HTTPStatus.NOT_FOUND, f"This call is not served here: {told}."
        elif status is HTTPStatus.NOT_FOUND:
            detail = not_served.PLAIN
    code = status.name.lower()
    problem = Problem(
        type=f"urn:gristmill:problem:{code}",
        title=status.phrase,
        status=status,
        detail=detail,
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
    HTTPStatus.UNAUTHORIZED: "An API key is needed, and none that is valid was sent.",
    HTTPStatus.FORBIDDEN: "A web page of another origin asks, or the key lacks the scope for this.",
    HTTPStatus.NOT_FOUND: "No such job, model or url.",
    HTTPStatus.CONFLICT: "The job's state does not allow this. Not to be retried.",
    HTTPStatus.GONE: "The job's request is not kept any more.",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "The body is larger than allowed.",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "The body is not plain `application/json`.",
    HTTPStatus.UNPROCESSABLE_ENTITY: "Well formed, and yet it cannot run: too long for the model's "
    "context, a deadline in the past, an Idempotency-Key used for another request.",
    HTTPStatus.MISDIRECTED_REQUEST: "The Host is a name that `api.allowed_hosts` does not have.",
    HTTPStatus.TOO_MANY_REQUESTS: "The queue is full, or a limit of the tenant is reached; "
    "`Retry-After` says when to try again, where waiting for a minute may help.",
    HTTPStatus.SERVICE_UNAVAILABLE: "Postgres cannot be reached, too much is in hand here, or "
    "no worker serves the model; `Retry-After` says when to try again.",
    HTTPStatus.INTERNAL_SERVER_ERROR: "The model or its process failed, also when tried again.",
    HTTPStatus.GATEWAY_TIMEOUT: "The answer did not come within the time that the caller waits.",
}


def documented(*statuses: HTTPStatus, door: Door = Door.OWN) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries of the errors that a route of this door may answer."""
    schema = {"$ref": f"#/components/schemas/{envelopes.SCHEMAS[door].__name__}"}
    return {
        int(status): {
            "description": RESPONSES[status],
            "content": {envelopes.media_type_of(door): {"schema": schema}},
        }
        for status in statuses
    }
