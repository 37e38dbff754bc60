"""The one way in: check, row, commit, message.

    parse_submission ─▶ Submitter: check ─▶ insert, commit ─▶ send

The commit is the promise. The message is only a wake-up: if it cannot be sent, the job stays
`queued` and `unsent` and rescue sends it later.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, Any
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

from app.broker.publisher import Publisher
from app.config.settings import Settings
from app.engines import grammar
from app.engines.catalog import CatalogModel
from app.errors import (
    DeadlinePassed,
    GristmillError,
    IdempotencyConflict,
    InvalidSchema,
    JobStateConflict,
    RequestError,
    RequestRemoved,
    RequestTooLarge,
)
from app.intake.admission import Admission
from app.intake.sender import Sender, num_bytes
from app.jobs import MAX_PRIORITY, REPLAYED, bounded
from app.requests import bodies
from app.requests.output_format import field_of
from app.requests.prepare import prepare
from app.store import reads, submissions
from app.store.database import Database
from app.store.submissions import Load, NewJob


def _only_text(value: object) -> object:
    if not (isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\dT", value)):
        raise ValueError("Input should be a time in RFC 3339 form, such as 2027-01-31T12:00:00Z")
    return value


Moment = Annotated[
    AwareDatetime, Field(strict=False), BeforeValidator(_only_text), AfterValidator(bounded)
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
                    for body in bodies.BODIES.values()
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
    metadata: Annotated[dict[str, str], BeforeValidator(bodies.parse_metadata)] = Field(
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
        raise bodies.first_problem(error, value) from None
    bodies.refuse_unstorable(submission.idempotency_key, "idempotency_key")
    return submission


@dataclass(frozen=True, slots=True)
class Submitted:
    """The job of a submission; not `created` if an earlier one with its key, or of the same replay,
    had brought it."""

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
        most = Load(settings.api.max_queued_jobs, settings.api.max_queued_tokens)
        self._admission = Admission(database, most)
        self.sender = Sender(database, publisher, settings.broker.max_messages)

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
        self._admission.expect_room(len(submissions))
        checked = [self._check(submission) for submission in submissions]
        jobs = [job for job in checked if isinstance(job, NewJob)]
        if not jobs:
            return [error for error in checked if isinstance(error, RequestError)]
        rows = iter(self._store(jobs))
        return [
            outcome if isinstance(outcome, RequestError) else _submitted(next(rows))
            for outcome in checked
        ]

    def replay(self, job_id: UUID) -> Submitted:
        """Run a job that failed, expired or was cancelled once more, as a new job.

        The new one has the request, priority and metadata of the old, and its deadline if that has
        not passed. A job is replayed once: asked again, this answers with the same new job. Raises
        `JobNotFound`, `JobStateConflict` if it has not ended or has completed, `RequestRemoved`,
        and what may be wrong with a submission.
        """
        with self._database.begin() as connection:
            old = reads.replayable(connection, job_id)
        if old.replayed_by is not None:
            return Submitted(old.replayed_by, False)
        if old.state not in REPLAYED:
            raise JobStateConflict(f"The job is {old.state}: only what ended badly is replayed.")
        if old.request is None:
            raise RequestRemoved()
        is_late = old.deadline is not None and old.deadline <= datetime.now(UTC)
        submission = Submission.model_construct(  # from a row: checked when it was written
            url=old.url,
            body=old.request,
            priority=old.priority,
            deadline=None if is_late else old.deadline,
            metadata=old.metadata,
        )
        [row] = self._store([replace(self._new_job(submission), replay_of=job_id)])
        return Submitted(row.id, row.created)

    def _store(self, jobs: Sequence[NewJob]) -> list[submissions.Inserted]:
        """Write rows, commit, send messages."""
        tokens = sum((job.input_tokens or 0) + (job.max_output_tokens or 0) for job in jobs)
        load = Load(len(jobs), tokens)
        wanted = self.sender.wanted(jobs)
        with self._admission.admitted(load), self._database.begin() as connection:
            inserted = submissions.insert_jobs(connection, jobs, wanted)
        sent = [job for job, row in zip(jobs, inserted, strict=True) if row.is_sent]
        self.sender.send(sent, num_left=sum(row.created for row in inserted) - len(sent))
        return inserted

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
            prepared = prepare(request, served.tokenizer, served.settings)
            _check_grammar(request)
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
            max_output_tokens=prepared.max_tokens * request.num_sequences,
            max_attempts=self._settings.worker.max_attempts,
        )

    def _request(self, submission: Submission) -> bodies.Request:
        limit = self._settings.api.max_body_bytes
        if num_bytes(submission.body) > limit:
            raise RequestTooLarge(f"The request is larger than {limit} bytes.", param="body")
        return bodies.parse(submission.body, submission.url)


def _check_grammar(request: bodies.Request) -> None:
    if request.grammar is None:
        return
    try:
        grammar.check(request.grammar)
    except InvalidSchema as error:
        error.param = field_of(request.grammar)
        raise


def _check_times(submission: Submission) -> None:
    deadline = submission.deadline
    if deadline is None:
        return
    if deadline <= datetime.now(UTC):
        raise DeadlinePassed("The deadline lies in the past.", param="deadline")
    if submission.not_before and deadline <= submission.not_before:
        raise DeadlinePassed("The deadline must be later than not_before.", param="deadline")


def _submitted(row: submissions.Inserted) -> Submitted | GristmillError:
    if not row.fingerprint_matches:
        return IdempotencyConflict()
    return Submitted(row.id, row.created)
