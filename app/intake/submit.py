"""The one way in: check, row, commit, message.

    parse_submission ─▶ Submitter: check ─▶ store: insert, commit ─▶ answer ─▶ send

The commit is the promise, and none is made to whom a no was told. The message is only a wake-up:
if it cannot be sent, the job stays `queued` and `unsent` and rescue sends it later.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from functools import partial
from typing import Annotated, Any, Final, Literal, TypeGuard
from uuid import UUID

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BeforeValidator,
    Field,
    ValidationError,
    WithJsonSchema,
)

from app.books.quote import Likely, cost_range
from app.books.work import Size
from app.broker.publisher import Publisher
from app.config.prices import price_id_of
from app.config.settings import PriceSettings, Settings
from app.engines.catalog import CatalogModel
from app.engines.sampling import grammar
from app.errors import (
    DeadlinePassed,
    GristmillError,
    IdempotencyConflict,
    InvalidSchema,
    JobStateConflict,
    NotStorable,
    RequestError,
    RequestRemoved,
)
from app.intake.admission import Admission
from app.intake.decision import Decision
from app.intake.outlook import Forecast, Outlook, asked_of, raw_size
from app.intake.quotas import Tenants
from app.intake.sender import Sender, num_bytes
from app.jobs import MAX_PRIORITY, REPLAYED, bounded, new_id
from app.requests import bodies
from app.requests.handling import Whole
from app.requests.part import Part
from app.requests.prepare import Prepared, prepare
from app.requests.problems import first_problem
from app.requests.storable import parse_metadata, refuse_unstorable
from app.store import reads, submissions
from app.store.counts import Load
from app.store.database import Database
from app.store.isolation import Connection, Write, apart
from app.store.submissions import NewJob
from app.store.tables import DEFAULT_TENANT
from app.webhooks.addresses import Reach
from app.webhooks.urls import MAX_URL, parse_url

PAGE_BYTES: Final = 2_000_000
"""Requests that are written in one statement."""


def _only_text(value: object) -> object:
    if not (isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\dT", value)):
        raise ValueError("Input should be a time in RFC 3339 form, such as 2027-01-31T12:00:00Z")
    return value


Moment = Annotated[
    AwareDatetime, Field(strict=False), BeforeValidator(_only_text), AfterValidator(bounded)
]


class Submission(Part):
    """What a producer submits: a request, and when and how it is to be run."""

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
    priority: Annotated[Whole, Field(ge=0, le=MAX_PRIORITY)] = Field(
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
    stream_events: bool = Field(
        False,
        description="Let its tokens be followed as they come: GET /v1/jobs/ID/events.",
        examples=[True],
    )
    metadata: Annotated[dict[str, str], BeforeValidator(parse_metadata)] = Field(
        default_factory=dict,
        description="Up to 16 texts of your own, given back with the job. Keys have up to 64 "
        "characters, values up to 512.",
        examples=[{"customer": "42"}],
    )
    webhook_url: Annotated[str, Field(max_length=MAX_URL)] | None = Field(
        None,
        description="Where to tell of the job's end, by a signed POST.",
        examples=["https://example.com/hooks/gristmill"],
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
        raise first_problem(error, value) from None
    refuse_unstorable(submission.idempotency_key, "idempotency_key")
    return submission


UnknownFields = Literal["refuse", "ignore"]


@dataclass(frozen=True, slots=True)
class Submitted:
    """The job of a submission; not `created` if an earlier one with its key, or of the same replay,
    had brought it."""

    job_id: UUID
    created: bool


@dataclass(frozen=True, slots=True)
class Stored:
    """What is committed: the answer is certain, whatever becomes of the messages."""

    outcomes: list[Submitted | GristmillError]
    new_jobs: list[NewJob]
    to_send: list[NewJob]  #: those of them whose messages are to be sent now
    at: datetime  #: by the database's clock; `created_at` of new jobs

    @property
    def only(self) -> Submitted:
        """The outcome of a single submission; raises what is wrong with it."""
        [outcome] = self.outcomes
        if isinstance(outcome, GristmillError):
            raise outcome
        return outcome

    def at_place(self, index: int) -> Stored:
        """What became of one of the submissions."""
        outcome = self.outcomes[index]
        job_id = outcome.job_id if isinstance(outcome, Submitted) and outcome.created else None
        new = [job for job in self.new_jobs if job.id == job_id]
        return replace(self, outcomes=[outcome], new_jobs=new)


@dataclass(frozen=True, slots=True)
class Quoted:
    """What a submission would bring, if it were one."""

    job: NewJob
    forecast: Forecast
    cost: tuple[Likely, Likely] | None  #: the least and the most; None without a price
    price_id: str | None
    price: PriceSettings | None
    known_as: UUID | None  #: the job that has its key already, and would be the answer


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
        self._reach = Reach.of(settings.webhooks)
        self.models = served
        most = Load(settings.api.max_queued_jobs, settings.api.max_queued_tokens)
        self.admission = Admission(database, most)
        self.sender = Sender(database, publisher, settings.broker)
        self.outlook = Outlook(settings, database)
        self.tenants = Tenants(database, self._likely_cost)

    def check(
        self,
        value: object,
        *,
        tenant: str = DEFAULT_TENANT,
        unknown_fields: UnknownFields | None = None,
    ) -> NewJob:
        """A tenant's job of a submission, or of the JSON value of one. Asks nobody, and may compute
        for some tenths of a second. Raises `RequestError`.

        Unknown fields of its body are treated as the settings say, unless it is said here.
        """
        ways = unknown_fields or self._settings.unknown_fields
        return self._new_job(parse_submission(value), tenant, ways)

    def store(self, decision: Decision, checked: Sequence[NewJob | RequestError]) -> Stored:
        """An outcome for each, in order; the good ones become jobs in one transaction.

        Raises `QueueFull` or `Unavailable` if nothing was stored. What is stored is then to be
        given to `send`.
        """
        now = self._database.now()
        checked = [_in_time(each, now) for each in checked]
        jobs = [job for job in checked if isinstance(job, NewJob)]
        stored = self._insert(jobs, decision, now) if jobs else Stored([], [], [], now)
        answers = iter(stored.outcomes)
        outcomes = [it if isinstance(it, RequestError) else next(answers) for it in checked]
        return replace(stored, outcomes=outcomes)

    def store_replay(
        self, decision: Decision, job_id: UUID, *, tenant: str = DEFAULT_TENANT
    ) -> Stored:
        """Run a tenant's job that failed, expired or was cancelled once more, as a new job.

        The new one has the request, priority and metadata of the old, and its deadline if that has
        not passed. A job is replayed once: asked again, this answers with the same new job. Raises
        `JobNotFound`, `JobStateConflict` if it has not ended or has completed, `RequestRemoved`,
        and what may be wrong with a submission.
        """
        with self._database.begin() as connection:
            old = reads.replayable(connection, job_id, tenant=tenant)
        now = self._database.now()
        if old.replayed_by is not None:
            return Stored([Submitted(old.replayed_by, False)], [], [], now)
        if old.state not in REPLAYED:
            raise JobStateConflict(f"The job is {old.state}: only what ended badly is replayed.")
        if old.request is None:
            raise RequestRemoved()
        submission = Submission.model_construct(  # from a row: checked when it was written
            url=old.url,
            body=old.request,
            priority=max(old.priority, 0),  # nobody waits for it any more
            deadline=old.deadline if old.deadline and old.deadline > now else None,
            metadata=old.metadata,
            webhook_url=old.webhook_url,
            stream_events=old.stream_events,
        )
        job = replace(self._new_job(submission, tenant, "refuse"), replay_of=job_id)
        return self._insert([job], decision, now)

    def quote(self, checked: Sequence[NewJob | RequestError]) -> list[Quoted | GristmillError]:
        """What `store` would do with each, in order, and what the jobs may expect. Writes nothing.

        Raises `QueueFull` if there is no room for them, and `Unavailable`.
        """
        now = self._database.now()
        checked = [_in_time(each, now) for each in checked]
        jobs = [job for job in checked if isinstance(job, NewJob)]
        self.admission.expect_room(len(jobs), _num_tokens(jobs))
        with self._database.autocommit() as connection:
            known = submissions.earlier(connection, jobs)
        self.outlook.look_if_old()
        forecasts = iter(self.outlook.expected(map(asked_of, jobs)))
        return [
            self._quoted(each, next(forecasts), known.get(each.id))
            if isinstance(each, NewJob)
            else each
            for each in checked
        ]

    def _quoted(
        self, job: NewJob, forecast: Forecast, known: submissions.Inserted | None
    ) -> Quoted | GristmillError:
        if known and not known.fingerprint_matches:
            return IdempotencyConflict()
        price_id = price_id_of(self._settings, job.model)
        price = self._settings.prices.get(price_id) if price_id else None
        cost = cost_range(price, raw_size(asked_of(job)), forecast.pace) if price else None
        return Quoted(job, forecast, cost, price_id, price, known.id if known else None)

    def _likely_cost(self, model: str, size: Size, currency: str) -> Decimal:
        """Of jobs of this size, together; 0 as long as nothing is known."""
        price_id = price_id_of(self._settings, model) if model in self._settings.models else None
        price = self._settings.prices.get(price_id) if price_id else None
        if price is None or price.currency != currency:
            return Decimal(0)
        least, most = cost_range(price, size, self.outlook.pace(model))
        return ((least.amount or Decimal(0)) + (most.amount or Decimal(0))) / 2

    def queued(self) -> Load:
        """What waits, as it is held against the limits of the queue."""
        return self.admission.queued()

    def send(self, stored: Stored) -> None:
        """Send the messages of what was stored, as far as that can be done now."""
        self.sender.send(stored.to_send, num_left=len(stored.new_jobs) - len(stored.to_send))

    def try_to_store(self) -> None:
        """Do what a submission does, but for keeping it. Raises what would become of one."""
        model, served = next(iter(self.models.items()))
        job = NewJob(
            id=new_id(),
            url="",
            kind=served.settings.kind,
            model=model,
            request={},
            fingerprint="",
            source="api",
        )
        with suppress(_NotKept), self._database.begin(looks_up=True) as connection:
            submissions.insert_jobs(connection, [job])
            raise _NotKept

    def _insert(self, jobs: Sequence[NewJob], decision: Decision, now: datetime) -> Stored:
        """Write rows and commit; an outcome for each job."""
        wanted = self.sender.wanted(jobs)

        def insert(connection: Connection, part: Sequence[NewJob]) -> Sequence[Outcome]:
            return submissions.insert_jobs(connection, part, wanted)

        with self.admission.admitted(Load(len(jobs), _num_tokens(jobs))):
            jobs = self.outlook.promised(jobs)
            try:
                rows = self._commit(jobs, decision, insert)
            except NotStorable:
                rows = self._commit(jobs, decision, partial(apart, insert))
        new = [(job, row) for job, row in zip(jobs, rows, strict=True) if _is_new(row)]
        return Stored(
            outcomes=[_submitted(row) for row in rows],
            new_jobs=[job for job, _ in new],
            to_send=[job for job, row in new if row.is_sent],
            at=next((row.created_at for _, row in new if row.created_at), now),
        )

    def _commit(
        self, jobs: Sequence[NewJob], decision: Decision, insert: Write[NewJob, Outcome]
    ) -> Sequence[Outcome]:
        """By pages: one statement for 64 MB would take too long, here and in Postgres."""
        outcomes: dict[UUID, Outcome] = {}
        bounded = self.tenants.bounded(job.tenant for job in jobs)
        with self._database.begin(looks_up=True) as connection:
            for page in _pages(jobs):
                if outcomes:
                    decision.step()
                inserted = insert(connection, page)
                outcomes |= zip((job.id for job in page), inserted, strict=True)
            if any(map(_is_new, outcomes.values())):
                self.tenants.enforce(connection, bounded, self._database.now())
            decision.commit()
        return [outcomes[job.id] for job in jobs]

    def _new_job(
        self, submission: Submission, tenant: str, unknown_fields: UnknownFields
    ) -> NewJob:
        try:
            request = bodies.parse(
                submission.body,
                submission.url,
                unknown_fields=unknown_fields,
                kind_of=self._settings.kind_of,
            )
            model = self._settings.model_name(request.kind, request.body.model)
            served = self.models[model]
            prepared = prepare(request, served.tokenizer, served.settings, served.card)
            _check_grammar(request, prepared)
        except RequestError as error:
            if error.param not in (None, "url", "body"):
                error.param = f"body.{error.param}"
            raise
        return NewJob(
            id=new_id(),
            url=request.url,
            kind=request.kind,
            model=model,
            request=request.raw,
            fingerprint=request.fingerprint,
            priority=submission.priority,
            not_before=submission.not_before,
            deadline=submission.deadline,
            stream_events=submission.stream_events,
            stored=request.sent.is_stored_chat,
            metadata=request.body.metadata | submission.metadata,
            tenant=tenant,
            idempotency_key=submission.idempotency_key,
            webhook_url=self._webhook_url(submission),
            source="api",
            input_tokens=prepared.num_input_tokens,
            max_output_tokens=prepared.max_tokens * request.num_sequences,
            max_attempts=self._settings.worker.max_attempts,
        )

    def _webhook_url(self, submission: Submission) -> str | None:
        """As it is called. Whether its host may be reached is seen, again, when it is."""
        if submission.webhook_url is None:
            return None
        url = parse_url(submission.webhook_url)
        self._reach.check_url(url)
        return str(url)


def _num_tokens(jobs: Iterable[NewJob]) -> int:
    """Those that jobs have, and those that they may generate."""
    return sum((job.input_tokens or 0) + (job.max_output_tokens or 0) for job in jobs)


def _pages(jobs: Sequence[NewJob]) -> Iterator[list[NewJob]]:
    """In the order of their keys: see `_INSERT` in `app.store.submissions`, which orders a page."""
    page: list[NewJob] = []
    size = 0
    for job in sorted(jobs, key=lambda job: (job.idempotency_key is None, job.idempotency_key)):
        size += num_bytes(job.request)
        if page and size > PAGE_BYTES:
            yield page
            page, size = [], num_bytes(job.request)
        page.append(job)
    yield page


def _check_grammar(request: bodies.Request, prepared: Prepared) -> None:
    if prepared.params is None or prepared.params.grammar is None:
        return
    try:
        grammar.check(prepared.params.grammar)
    except InvalidSchema as error:
        error.param = request.body.grammar_field
        raise


def _in_time(job: NewJob | RequestError, now: datetime) -> NewJob | RequestError:
    """The job, or what is wrong with its times by the database's clock."""
    if isinstance(job, RequestError) or job.deadline is None:
        return job
    if job.deadline <= now:
        return DeadlinePassed("The deadline lies in the past.", param="deadline")
    if job.not_before and job.deadline <= job.not_before:
        return DeadlinePassed("The deadline must be later than not_before.", param="deadline")
    return job


Outcome = submissions.Inserted | NotStorable


def _is_new(row: Outcome) -> TypeGuard[submissions.Inserted]:
    return isinstance(row, submissions.Inserted) and row.created


class _NotKept(Exception):
    """Rolls back."""


def _submitted(row: submissions.Inserted | NotStorable) -> Submitted | GristmillError:
    if isinstance(row, NotStorable):
        return RequestError("The store cannot hold a value of this job.")
    if not row.fingerprint_matches:
        return IdempotencyConflict()
    return Submitted(row.id, row.created)
