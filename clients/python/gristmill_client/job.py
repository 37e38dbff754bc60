"""A job as the API tells of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from gristmill_client.errors import GristmillError, error_of
from gristmill_client.state import JobState


@dataclass(frozen=True, slots=True)
class Job:
    """A job as it was when it was asked for. `raw` is all of it: timing, usage, cost and more.

    Its answer is not in its `repr`, and so in no log.
    """

    id: str
    state: JobState
    response: dict[str, Any] | None = field(repr=False)
    error: dict[str, Any] | None
    raw: dict[str, Any] = field(repr=False)

    @classmethod
    def of(cls, raw: Any) -> Self:
        """Raises `GristmillError` if it is no job that this version knows."""
        try:
            job_id, state = str(raw["id"]), JobState(raw["state"])
            response, error = raw.get("response"), raw.get("error")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise _unknown() from None
        if not all(each is None or isinstance(each, dict) for each in (response, error)):
            raise _unknown()
        return cls(job_id, state, response, error, raw)


class JobFailed(GristmillError):
    """A job ended without a result to give: failed, cancelled or expired."""

    code = "job_failed"

    def __init__(self, job: Job) -> None:
        error = job.error or {}
        self.job = job
        self.error_code: str | None = error.get("code")
        super().__init__(f"Job {job.id} {job.state}: {error.get('message', 'no reason given')}")

    def __reduce__(self) -> tuple[type[Self], tuple[Job]]:
        return type(self), (self.job,)


@dataclass(frozen=True, slots=True)
class Cancelled:
    """What became of the wish to cancel a job.

    `state` is `cancelled`, or `running` until its worker has stopped it. Where there is an `error`,
    the job is not cancelled.
    """

    id: str
    state: JobState | None
    error: GristmillError | None

    @classmethod
    def of(cls, item: dict[str, Any]) -> Self:
        """Raises as `Job.of` does."""
        try:
            state, error = item.get("state"), item.get("error")
            return cls(
                id=str(item["id"]),
                state=JobState(state) if state else None,
                error=error_of(error) if error else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise _unknown() from None


def _unknown() -> GristmillError:
    return GristmillError(
        "The API told of a job as this client does not know it: is it Gristmill's, and of the same "
        "version?"
    )
