"""The one way in: check, row, commit, message.

    parse_submission ─▶ Submitter: check ─▶ insert, commit ─▶ send

The commit is the promise. The message is only a wake-up: if it cannot be sent, the job stays
`queued` with `enqueued_at` null and rescue sends it later.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final
from uuid import UUID, uuid4

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)

from app import requests
from app.broker import Message, Publisher
from app.config import Settings
from app.engines.catalog import CatalogModel
from app.errors import (
    DeadlinePassed,
    GristmillError,
    IdempotencyConflict,
    QueueFull,
    RequestError,
    RequestTooLarge,
    Unavailable,
)
from app.jobs import MAX_PRIORITY
from app.store import intake
from app.store.database import Database
from app.store.intake import NewJob

log = logging.getLogger(__name__)

MAX_INLINE_BYTES: Final = 256_000
"""Larger requests travel as a bare wake-up, so that Redis stays small and no message outgrows what
a worker takes. The row has the request."""

BREAK_S: Final = 5.0
"""After a failed send nobody tries again for this long: submissions do not wait for Redis."""

PAGE_SIZE: Final = 1_000
"""Messages that are sent, and marked as sent, at once."""

COUNT_EVERY_S: Final = 1.0
"""How old the count of queued jobs may be that is held against the limit, unless counting is slow:
a million rows take a while, so it has at most one part in `COUNT_SHARE` of the time."""
COUNT_SHARE: Final = 20


def _only_text(value: object) -> object:
    if not (isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\dT", value)):
        raise ValueError("Input should be a time in RFC 3339 form, such as 2027-01-31T12:00:00Z")
    return value


def _in_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("Input should lie within the years 1 to 9999 in UTC") from None


Moment = Annotated[
    AwareDatetime, Field(strict=False), BeforeValidator(_only_text), AfterValidator(_in_utc)
]


class Submission(BaseModel):
    """What a producer submits: a request, and when and how it is to be run."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    url: str | None = Field(
        None,
        description="Which call the body is of; follows from the body when left out.",
        examples=["/v1/chat/completions"],
    )
    body: Annotated[
        dict[str, Any],
        WithJsonSchema(
            {
                "oneOf": [
                    {"$ref": f"#/components/schemas/{body.__name__}"}
                    for body in requests.BODIES.values()
                ]
            }
        ),
    ] = Field(
        description="The body of the OpenAI-style call.",
        examples=[{"messages": [{"role": "user", "content": "What is a grist mill?"}]}],
    )
    priority: Annotated[int, Field(ge=0, le=MAX_PRIORITY)] = Field(
        0, description="0 is served first, 9 last.", examples=[0]
    )
    not_before: Moment | None = Field(
        None,
        description="Earliest time to run the job (RFC 3339).",
        examples=["2027-01-31T12:00:00Z"],
    )
    deadline: Moment | None = Field(
        None,
        description="The job expires if it is not finished by then (RFC 3339).",
        examples=["2027-01-31T18:00:00Z"],
    )
    metadata: Annotated[dict[str, str], BeforeValidator(requests.parse_metadata)] = Field(
        default_factory=dict,
        description="Up to 16 texts of your own, given back with the job. Keys have up to 64 "
        "characters, values up to 512.",
        examples=[{"customer": "42"}],
    )
    idempotency_key: Annotated[str, Field(min_length=1, max_length=255)] | None = Field(
        None,
        description="The same key and request once more are the same job. The header "
        "Idempotency-Key of a single submission does the same.",
        examples=["order-42-summary"],
    )


def parse_submission(value: object) -> Submission:
    """Check all of a submission but the request in it, which `Submitter` checks.

    Raises `RequestError` naming the first wrong field.
    """
    if isinstance(value, Submission):
        return value
    if not isinstance(value, dict):
        raise RequestError("A job must be a JSON object.")
    try:
        submission = Submission.model_validate(value)
    except ValidationError as error:
        raise requests.first_problem(error, value) from None
    requests.refuse_unstorable(submission.idempotency_key, "idempotency_key")
    return submission


@dataclass(frozen=True, slots=True)
class Submitted:
    """The job of a submission; not `created` if its Idempotency-Key had brought it before."""

    job_id: UUID
    created: bool


class Submitter:
    """Turns submissions into jobs. Threads may share it."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        publisher: Publisher,
        served: dict[str, CatalogModel],
    ) -> None:
        self._settings = settings
        self._database = database
        self.models = served
        self._admission = Admission(database, settings.api.max_queued_jobs)
        self.sender = Sender(database, publisher)

    def submit(self, submission: Submission) -> Submitted:
        """One submission; raises what is wrong with it, `QueueFull` or `Unavailable`."""
        [outcome] = self.submit_many([submission])
        if isinstance(outcome, GristmillError):
            raise outcome
        return outcome

    def submit_many(self, submissions: Sequence[object]) -> list[Submitted | GristmillError]:
        """An outcome for each submission, in order; the good ones become jobs in one transaction.

        Takes submissions, or the JSON values of some. Raises `QueueFull` or `Unavailable` if
        nothing was stored.
        """
        checked = [self._check(submission) for submission in submissions]
        jobs = [job for job in checked if isinstance(job, NewJob)]
        if not jobs:
            return [error for error in checked if isinstance(error, RequestError)]
        self._admission.admit(len(jobs))
        with self._database.begin() as connection:
            inserted = intake.insert_jobs(connection, jobs)
        self.sender.send([job for job, row in zip(jobs, inserted, strict=True) if row.created])
        rows = iter(inserted)
        return [
            outcome if isinstance(outcome, RequestError) else _submitted(next(rows))
            for outcome in checked
        ]

    def _check(self, submission: object) -> NewJob | RequestError:
        try:
            return self._new_job(parse_submission(submission))
        except RequestError as error:
            return error

    def _new_job(self, submission: Submission) -> NewJob:
        try:
            request = self._request(submission)
            model = self._settings.model_name(request.kind, request.body.model)
            served = self.models[model]
            prepared = served.tokenizer.check(request, served.settings)
        except RequestError as error:
            if error.param not in (None, "url", "body"):
                error.param = f"body.{error.param}"
            raise
        _check_times(submission)
        return NewJob(
            id=uuid4(),
            url=request.url,
            kind=request.kind,
            model=model,
            request=request.raw,
            fingerprint=request.fingerprint,
            priority=submission.priority,
            not_before=submission.not_before,
            deadline=submission.deadline,
            metadata=submission.metadata,
            idempotency_key=submission.idempotency_key,
            source="api",
            input_tokens=prepared.num_input_tokens,
            max_output_tokens=prepared.max_tokens,
            max_attempts=self._settings.worker.max_attempts,
        )

    def _request(self, submission: Submission) -> requests.Request:
        limit = self._settings.api.max_body_bytes
        if _num_bytes(submission.body) > limit:
            raise RequestTooLarge(f"The request is larger than {limit} bytes.", param="body")
        return requests.parse(submission.body, submission.url)


def _check_times(submission: Submission) -> None:
    deadline = submission.deadline
    if deadline is None:
        return
    if deadline <= datetime.now(UTC):
        raise DeadlinePassed("The deadline lies in the past.", param="deadline")
    if submission.not_before and deadline <= submission.not_before:
        raise DeadlinePassed("The deadline must be later than not_before.", param="deadline")


def _submitted(row: intake.Inserted) -> Submitted | GristmillError:
    if not row.fingerprint_matches:
        return IdempotencyConflict()
    return Submitted(row.id, row.created)


def _num_bytes(request: dict[str, Any]) -> int:
    return len(json.dumps(request, ensure_ascii=False).encode())


class Admission:
    """Holds the number of queued jobs against a limit. Counting is not free, so the count is
    taken now and then, and what was let in since is added to it."""

    def __init__(self, database: Database, max_queued_jobs: int) -> None:
        self._database = database
        self._max_queued_jobs = max_queued_jobs
        self._lock = threading.Lock()
        self._num_queued = 0
        self._count_again_at = 0.0

    def admit(self, num_jobs: int) -> None:
        """Raises `QueueFull` if there is no room for so many more."""
        if self._is_count_due():
            began = time.monotonic()
            with self._database.begin() as connection:
                self._num_queued = intake.count_queued(connection)
            took_s = time.monotonic() - began
            self._count_again_at = max(self._count_again_at, began + COUNT_SHARE * took_s)
        with self._lock:
            if self._num_queued + num_jobs > self._max_queued_jobs:
                raise QueueFull(
                    f"The queue takes {self._max_queued_jobs} jobs and has no room for these."
                )
            self._num_queued += num_jobs

    def _is_count_due(self) -> bool:
        """True for one caller at a time: the others go on with the count there is."""
        now = time.monotonic()
        with self._lock:
            if now < self._count_again_at:
                return False
            self._count_again_at = now + COUNT_EVERY_S
            return True


class Sender:
    """Sends the messages of new jobs as well as it can, and never makes a submission fail.

    A send that fails opens a pause in which nobody tries, and at its end one caller does.
    """

    def __init__(self, database: Database, publisher: Publisher) -> None:
        self._database = database
        self._publisher = publisher
        self._lock = threading.Lock()
        self._try_again_at: float | None = None
        self.num_sent = 0
        self.num_left_to_rescue = 0

    def send(self, jobs: Sequence[NewJob]) -> None:
        """Jobs that are not due yet are left to rescue, which wakes them in time."""
        now = datetime.now(UTC)
        due = [job for job in jobs if job.not_before is None or job.not_before <= now]
        for start in range(0, len(due), PAGE_SIZE):
            page = due[start : start + PAGE_SIZE]
            is_sent = self._may_try() and self._try(page)
            with self._lock:
                if is_sent:
                    self.num_sent += len(page)
                else:
                    self.num_left_to_rescue += len(page)

    def _try(self, jobs: Sequence[NewJob]) -> bool:
        try:
            self._publisher.send_many(map(_message, jobs))
        except Unavailable as error:
            self._try_again_at = time.monotonic() + BREAK_S
            log.warning("%s Rescue sends later.", error, extra={"action": "send_failed"})
            return False
        self._try_again_at = None
        try:
            with self._database.autocommit() as connection:
                intake.mark_enqueued(connection, [job.id for job in jobs])
        except Unavailable:
            log.warning("Sent, but not marked so.", extra={"action": "mark_enqueued_failed"})
        return True

    def _may_try(self) -> bool:
        now = time.monotonic()
        with self._lock:
            if self._try_again_at is None:
                return True
            if now < self._try_again_at:
                return False
            self._try_again_at = now + BREAK_S
            return True


def _message(job: NewJob) -> Message:
    is_inline = _num_bytes(job.request) <= MAX_INLINE_BYTES
    return Message(
        job_id=job.id,
        kind=job.kind,
        model=job.model,
        request=job.request if is_inline else None,
        url=job.url if is_inline else None,
        priority=job.priority,
    )
