"""Errors that the API answers, by their codes, and whose fault each is.

    GristmillError
    ├── RequestError           the request is wrong; never tried again
    │   ├── ModelNotFound, UrlNotFound, ContextLengthExceeded, InvalidSchema
    │   ├── DeadlinePassed, RequestTooLarge
    │   └── WebhookRefused, WebhookUnreachable
    ├── Unauthorized           the key is missing, of no use any more, or may not do this
    ├── IdempotencyConflict    same key, another request
    ├── JobNotFound, JobUnreadable
    ├── JobStateConflict       the job is not in a state that allows this
    ├── RequestRemoved, ResponseRemoved
    ├── NotStorable            the store cannot hold a value
    ├── QueueFull, Busy        bounded admission; come back later
    │   └── QuotaExceeded      a limit of your tenant
    │       └── RateLimited, BudgetSpent
    └── Unavailable            the API, or what it needs, cannot be reached; come back later

A code that this version does not know is a `GristmillError` with that `code`.
"""

from __future__ import annotations

from typing import Any, Final


class GristmillError(Exception):
    """Something went wrong."""

    code: str = "internal_error"

    def __init__(self, message: str | None = None, *, code: str | None = None) -> None:
        super().__init__(message or self.__doc__)
        if code is not None:
            self.code = code

    @property
    def message(self) -> str:
        return str(self)


class RequestError(GristmillError):
    """The request is wrong. `param` is the path of the field in the request, if one is."""

    code = "invalid_request"

    def __init__(
        self, message: str | None = None, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.param = param


class ModelNotFound(RequestError):
    """No such model is configured."""

    code = "model_not_found"


class UrlNotFound(RequestError):
    """No such url of a request."""

    code = "url_not_found"


class ContextLengthExceeded(RequestError):
    """Prompt and allowed output do not fit the model's context."""

    code = "context_length_exceeded"


class InvalidSchema(RequestError):
    """The JSON schema or regular expression for the output cannot be used."""

    code = "invalid_schema"


class DeadlinePassed(RequestError):
    """The deadline is over before the job could run."""

    code = "deadline_passed"


class RequestTooLarge(RequestError):
    """The request body is larger than allowed."""

    code = "request_too_large"


class WebhookRefused(RequestError):
    """The URL of a webhook leads where webhooks may not go."""

    code = "webhook_refused"


class WebhookUnreachable(RequestError):
    """The receiver of a webhook gave no answer."""

    code = "webhook_unreachable"


class Unauthorized(GristmillError):
    """The API key is missing, or of no use."""

    code = "unauthorized"


class IdempotencyConflict(GristmillError):
    """The Idempotency-Key was used before with another request."""

    code = "idempotency_conflict"


class JobNotFound(GristmillError):
    """No such job."""

    code = "job_not_found"


class JobUnreadable(GristmillError):
    """The job's row holds what the server cannot read."""

    code = "job_unreadable"


class JobStateConflict(GristmillError):
    """The job is in a state that does not allow this."""

    code = "job_state_conflict"


class RequestRemoved(GristmillError):
    """The job's request is not there: its time was over, or its message could not be read."""

    code = "request_removed"


class ResponseRemoved(GristmillError):
    """The job completed, and its response was removed when its time was over."""

    code = "response_removed"


class NotStorable(GristmillError):
    """The store cannot hold a value."""

    code = "not_storable"


class QueueFull(GristmillError):
    """The queue is full. `retry_after` is in whole seconds."""

    code = "queue_full"
    retry_after: int = 5


class QuotaExceeded(QueueFull):
    """A limit of your tenant is reached."""

    code = "quota_exceeded"


class RateLimited(QuotaExceeded):
    """Your tenant makes too many calls."""

    code = "rate_limit_exceeded"


class BudgetSpent(QuotaExceeded):
    """Your tenant has spent what it may."""

    code = "insufficient_quota"


class Busy(GristmillError):
    """There is too much in hand at the server."""

    code = "busy"


class Unavailable(GristmillError):
    """The API, or a service that it needs, cannot be reached right now."""

    code = "unavailable"


def _by_code(kind: type[GristmillError]) -> dict[str, type[GristmillError]]:
    found = {kind.code: kind}
    for child in kind.__subclasses__():
        found |= _by_code(child)
    return found


_KINDS: Final = _by_code(GristmillError)


def error_of(problem: dict[str, Any]) -> GristmillError:
    """The error that a problem document (RFC 9457) tells of. Raises `KeyError` if it is none."""
    code = problem["code"]
    kind = _KINDS.get(code, GristmillError)
    if issubclass(kind, RequestError):
        return kind(problem["detail"], code=code, param=problem.get("param"))
    return kind(problem["detail"], code=code)
