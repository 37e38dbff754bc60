"""Every error that Gristmill raises, and whose fault it is.

    GristmillError
    ├── ConfigError            wrong settings; refused at start, with file and line
    ├── SchemaError            the database is older or newer than this code
    ├── RequestError           the caller's request is wrong; never retried
    │   ├── ModelNotFound
    │   ├── UrlNotFound
    │   ├── ContextLengthExceeded
    │   ├── InvalidSchema
    │   ├── InvalidValue       of OpenAI's own words for what is wrong, as are the next two
    │   ├── InvalidType
    │   ├── MissingParameter
    │   ├── DeadlinePassed
    │   ├── LaterFormat        of a later version: for other workers, not a failure
    │   ├── WebhookRefused     its URL leads where webhooks may not go
    │   ├── WebhookUnreachable a test of it was not answered
    │   └── RequestTooLarge
    ├── IdempotencyConflict    same key, another request
    ├── JobNotFound
    ├── NoSuchFile
    ├── WebhookNotFound
    ├── WebhookConflict        not while it is as it is
    ├── KeyNotFound            no API key of this id, or it is not valid any more
    ├── NoKey                  a call without an API key, or with one that is not valid
    ├── BatchNotFound
    ├── BatchStateConflict     the batch is not in a state that allows this
    ├── BatchKeyConflict       same key, another batch
    ├── JobUnreadable          its row was written by hand, or by a later version
    ├── JobStateConflict       the job is not in a state that allows this
    ├── RequestRemoved         the job's request is not kept any more
    ├── ResponseRemoved        the job's response is not kept any more
    ├── LeaseLost              this worker was declared stopped; it must end
    ├── QueueFull              bounded admission; come back later
    │   └── QuotaExceeded      a limit of the tenant's own
    │       ├── RateLimited    calls a minute
    │       └── BudgetSpent    money a day or month
    ├── Busy                   this process has too much in hand; come back soon
    ├── NotStorable            the store cannot hold a value; trying again would not help
    ├── NoWorker               nobody is up who could answer a caller that waits
    ├── TimedOut               a caller that waits had no answer in its time
    ├── Cancelled              a job that a caller waits for was cancelled
    ├── Restarted              a stream told tokens that an answer does not begin with any more
    ├── Unavailable            Postgres or Redis cannot be reached; come back later
    │   └── StorageUnavailable the storage of files cannot
    │       └── ObjectMissing  it can, and has not what it should have
    ├── AttemptsExhausted      a job was interrupted too often
    └── EngineError            the model or its process failed
        ├── EngineCrashed      the engine process died
        └── OutOfMemory        the batch did not fit the device

An error carries a stable `code` for programs and metrics and a sentence for people. Neither ever
holds a prompt or an output.
"""

from __future__ import annotations

from typing import ClassVar


class GristmillError(Exception):
    """Something went wrong in Gristmill."""

    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or self.__doc__)

    @property
    def message(self) -> str:
        return str(self)


class ConfigError(GristmillError):
    """A setting is wrong."""

    code = "config_error"


class SchemaError(GristmillError):
    """The database schema does not fit this version of Gristmill."""

    code = "schema_error"


class RequestError(GristmillError):
    """The request is wrong. `param` is the path of the field in the request body, if one is."""

    code = "invalid_request"

    def __init__(self, message: str | None = None, *, param: str | None = None) -> None:
        super().__init__(message)
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


class InvalidValue(RequestError):
    """A parameter has a value that is not supported."""

    code = "invalid_value"


class InvalidType(RequestError):
    """A parameter has a value of another type."""

    code = "invalid_type"


class MissingParameter(RequestError):
    """A parameter is missing."""

    code = "missing_required_parameter"


class DeadlinePassed(RequestError):
    """The deadline is over before the job could run."""

    code = "deadline_passed"


class LaterFormat(RequestError):
    """The request is in a format of a later version of Gristmill."""

    code = "later_format"


class WebhookRefused(RequestError):
    """The URL of a webhook leads where webhooks may not go."""

    code = "webhook_refused"


class WebhookUnreachable(RequestError):
    """The receiver of a webhook gave no answer."""

    code = "webhook_unreachable"


class RequestTooLarge(RequestError):
    """The request body is larger than allowed."""

    code = "request_too_large"


class IdempotencyConflict(GristmillError):
    """The Idempotency-Key was used before with another request."""

    code = "idempotency_conflict"


class JobNotFound(GristmillError):
    """No such job."""

    code = "job_not_found"


class WebhookNotFound(GristmillError):
    """No such webhook endpoint."""

    code = "webhook_not_found"


class WebhookConflict(GristmillError):
    """The webhook endpoint or delivery is not in a state that allows this."""

    code = "webhook_conflict"


class NoSuchFile(GristmillError):
    """No such file."""

    code = "file_not_found"


class KeyNotFound(GristmillError):
    """No such API key."""

    code = "key_not_found"


class NoKey(GristmillError):
    """The call needs an API key."""

    code = "unauthorized"


class BatchNotFound(GristmillError):
    """No such batch."""

    code = "batch_not_found"


class BatchStateConflict(GristmillError):
    """The batch is in a state that does not allow this."""

    code = "batch_state_conflict"


class BatchKeyConflict(GristmillError):
    """The idempotency key was used before for another batch."""

    code = "batch_key_conflict"


class JobUnreadable(GristmillError):
    """The job's row holds what this version of Gristmill cannot read."""

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


class LeaseLost(GristmillError):
    """This worker is not registered any more; its jobs are others' now."""

    code = "lease_lost"


class QueueFull(GristmillError):
    """The queue is full. `retry_after` is in whole seconds."""

    code = "queue_full"
    retryable = True

    def __init__(self, message: str | None = None, *, retry_after: int = 5) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QuotaExceeded(QueueFull):
    """A limit of the tenant is reached. `limit` names it. Where waiting up to a minute cannot help
    there is no time to come back after."""

    code = "quota_exceeded"

    def __init__(
        self, message: str | None = None, *, limit: str = "", retry_after: int | None = None
    ) -> None:
        super().__init__(message, retry_after=retry_after or 0)
        self.limit = limit


class RateLimited(QuotaExceeded):
    """The tenant makes too many calls."""

    code = "rate_limit_exceeded"


class BudgetSpent(QuotaExceeded):
    """The tenant has spent what it may."""

    code = "insufficient_quota"


class Busy(GristmillError):
    """There is too much in hand here. `retry_after` is in whole seconds."""

    code = "busy"
    retryable = True
    retry_after: ClassVar[int] = 2


class NoWorker(GristmillError):
    """No worker that is up serves this model."""

    code = "no_worker"
    retryable = True


class TimedOut(GristmillError):
    """The answer did not come within the time that the caller waits."""

    code = "deadline_exceeded"
    retryable = True


class Cancelled(GristmillError):
    """The job was cancelled."""

    code = "cancelled"


class Restarted(GristmillError):
    """The answer was begun anew after its worker was lost, and is not what was told of it."""

    code = "restarted"
    retryable = True


class Unavailable(GristmillError):
    """A service that Gristmill needs cannot be reached right now."""

    code = "unavailable"
    retryable = True


class StorageUnavailable(Unavailable):
    """The storage of files does not answer, or refuses. Try again."""

    code = "storage_unavailable"


class ObjectMissing(StorageUnavailable):
    """What a row says is there is not. It may come back: a folder that is not mounted, say."""


class NotStorable(GristmillError):
    """The store cannot hold a value."""

    code = "not_storable"


class AttemptsExhausted(GristmillError):
    """The job was interrupted too often."""

    code = "attempts_exhausted"


class EngineError(GristmillError):
    """The engine failed. `code` is that of what it failed with, if that has one."""

    code = "engine_error"
    retryable = True

    def __init__(self, message: str | None = None, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code  # type: ignore[misc]


class EngineCrashed(EngineError):
    """The engine process died while it ran this batch."""

    code = "engine_crash"


class OutOfMemory(EngineError):
    """The batch did not fit into the device's memory."""

    code = "out_of_memory"


def of_code(code: str, message: str) -> GristmillError:
    """The error that a job ended with, from what its row says of it."""
    known = _by_code(GristmillError).get(code)
    return known(message) if known is not None else EngineError(message, code=code)


def _by_code(kind: type[GristmillError]) -> dict[str, type[GristmillError]]:
    found = {kind.code: kind}
    for child in kind.__subclasses__():
        found |= _by_code(child)
    return found
