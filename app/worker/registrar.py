"""The registrar: gives every message that reached this worker a row, and sorts them.

Messages are registered in groups, one statement for all that arrived since the last turn. From then
on the row is the truth: a message whose row is running, final or not due has nothing more to do.

Messages that have a row already, and fill a batch at once, are taken instead: claimed and read in
one statement. Those that it does not get are registered like all others.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from app.broker.message import Message
from app.broker.publisher import Publisher
from app.broker.queues import queues_of
from app.engines.catalog import CatalogModel
from app.errors import (
    JobNotFound,
    JobStateConflict,
    RequestError,
    RequestRemoved,
    Unavailable,
)
from app.jobs import JobState, Kind
from app.requests import bodies
from app.requests.bodies import Request
from app.requests.prepare import Prepared, prepare
from app.store import cancellation, delivery, submissions
from app.store.claims import Taken
from app.store.database import Database
from app.store.submissions import NewJob, Received, RejectedJob
from app.store.tables import DEFAULT_TENANT
from app.threads import place_of
from app.worker.batcher import Candidate
from app.worker.isolation import ODD, by_halves, said
from app.worker.pool.arrivals import Arrival, Refusal
from app.worker.pool.ticket import Ticket
from app.worker.work import Doomed, Ending, Job, Take

log = logging.getLogger(__name__)

NO_REQUEST = RequestError("The message brought no request, and there is no job with its id.")
NOT_STORABLE = RequestError("The message holds a value that cannot be stored.")
NOT_READABLE = RequestError("The job's row holds a value that cannot be read.")


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A ticket that is not registered yet, with what its request means to its model."""

    ticket: Ticket
    arrived_ns: int
    prepared: Prepared | RequestError | None  #: None: the message brought no request we can run
    was_left: bool = False  #: it was to be taken, and its job was not granted

    @property
    def arrival(self) -> Arrival:
        return self.ticket.arrival


class Registrar:
    """Owns everything between a message's arrival and its place in the batcher."""

    def __init__(
        self,
        *,
        worker_id: UUID,
        database: Database,
        publisher: Publisher,
        served: dict[str, CatalogModel],
        max_attempts: int,
        message_tenant: str = DEFAULT_TENANT,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._worker_id = worker_id
        self._database = database
        self._publisher = publisher
        self._served = served
        self._max_attempts = max_attempts
        self._message_tenant = message_tenant
        self._now_ns = now_ns
        self._models = {queue: model for model in served for queue in queues_of([model])}
        self._only_model = next(iter(served)) if len(served) == 1 else None
        self._waiting: list[_Waiting] = []
        self._taking: dict[UUID, _Waiting] = {}  #: under a take whose fate is not known yet
        self._refusals: list[Refusal] = []
        self._revoked: deque[tuple[UUID, Kind]] = deque()
        self._given_back: list[UUID] = []
        self._is_unsure = False  #: whether what waits has been received: the answer was lost
        self._has_forgotten = False  #: what may have been received

    @property
    def has_work(self) -> bool:
        waits = self._waiting or self._refusals or self._revoked or self._given_back
        return bool(waits or self._taking or self._has_forgotten)

    def add(self, ticket: Ticket) -> None:
        arrival = ticket.arrival
        prepared = self._prepare(arrival.request, arrival.model) if arrival.request else None
        self._waiting.append(_Waiting(ticket, self._now_ns(), prepared))

    def refuse(self, refusal: Refusal) -> None:
        self._refusals.append(refusal)

    def revoke(self, job_id: UUID, kind: Kind) -> None:
        """Celery revoked this job: its row must say so too."""
        self._revoked.append((job_id, kind))

    def give_back(self, job_id: UUID) -> None:
        """The job was received and will not be claimed here."""
        self._given_back.append(job_id)

    def compare(self) -> None:
        """With the rows that say we hold them: those that we do not know of are freed next."""
        self._has_forgotten = True

    def forget_waiting(self) -> None:
        """Drop what is not registered yet: the messages come again. What is being taken may have a
        claim, and stays."""
        self._waiting.clear()
        self._has_forgotten = self._has_forgotten or self._is_unsure
        self._is_unsure = False

    def clear(self) -> None:
        """Forget everything: there is no time left for it."""
        self._waiting, self._refusals, self._given_back = [], [], []
        self._taking.clear()
        self._revoked.clear()
        self._has_forgotten = False

    # ── messages that are taken ──────────────────────────────────────────────────────────────

    def takable(self, known: Collection[UUID]) -> dict[str, list[Candidate]]:
        """What waits and only wakes a row, by model; without models for which other messages wait
        too: in what order they go in, their rows say."""
        if not self._waiting:
            return {}
        known = {*known, *(id for id, _ in self._revoked)}
        found: dict[str | None, list[Candidate]] = {}
        others: set[str | None] = set()
        for id, each in _leading(self._waiting).items():
            model = self._model_of(each.arrival)
            if each.arrival.request is not None or each.was_left:
                others.add(model)
            elif id not in known:
                found.setdefault(model, []).append(_candidate(each, model or ""))
        if None in others or None in found:
            return {}
        return {model: came for model, came in found.items() if model and model not in others}

    def _model_of(self, arrival: Arrival) -> str | None:
        """None if that is not known before its row is."""
        return arrival.model or self._models.get(arrival.queue or "", self._only_model)

    def keep(self, take: Take) -> None:
        """These messages are being taken, until `sort_taken` says what became of them."""
        leading = _leading(self._waiting)
        self._taking = {id: leading[id] for id in take.attempts}
        taking = self._taking
        self._waiting = [w for w in self._waiting if taking.get(w.arrival.job_id) is not w]

    def sort_taken(
        self, take: Take, taken: Iterable[Taken], refused: Iterable[UUID]
    ) -> list[Job | Doomed]:
        """The jobs of what was granted, and those that cannot run; the rest waits as before."""
        sorted_ = [self._sort_taken(take, each.row) for each in taken]
        sorted_ += [self._doomed(take, id, NOT_READABLE) for id in refused]
        left = [replace(each, was_left=True) for each in self._taking.values()]
        self._waiting = [*left, *self._waiting]
        self._taking = {}
        return sorted_

    def _sort_taken(self, take: Take, row: Received) -> Job | Doomed:
        try:
            job = self._job(self._taking[row.id], row)
        except RequestError as error:
            return self._doomed(take, row.id, error)
        del self._taking[row.id]
        job.attempt_id, job.closed_ns = take.attempts[row.id], job.registered_ns
        return job

    def _doomed(self, take: Take, id: UUID, error: RequestError) -> Doomed:
        ticket, batch = self._taking.pop(id).ticket, take.batch
        ending = Ending.failed(error)
        return Doomed(ticket, batch.model, ending, take.attempts[id], batch.id)

    # ── messages that are registered ─────────────────────────────────────────────────────────

    def register(self, known: Mapping[UUID, Job]) -> list[Job | Doomed]:
        """Write the rows of all that waits; returns the jobs that are now ready for a batch, and
        those that cannot run.

        `known` holds the jobs that this worker has already: a second message is dropped.
        Raises `Unavailable`; everything then waits for the next call.
        """
        waiting, leading = self._waiting, _leading(self._waiting)
        self._free(known)  # first, for a message may have come again of what is let go of
        self._is_unsure = True
        received, unstorable = self._receive(leading.values())
        self._is_unsure = False
        self._refusals = [*self._refusals, *unstorable]
        self._reject()
        self._cancel_revoked()
        for refusal in self._refusals:
            refusal.acknowledge()
        self._waiting, self._refusals, self._given_back = [], [], []
        for each in waiting:
            if each is not leading[each.arrival.job_id]:
                each.ticket.dropped()
        for refusal in unstorable:
            del leading[refusal.job_id]
        sorted_ = [self._sort(each, received.get(id), known) for id, each in leading.items()]
        return [job for job in sorted_ if job is not None]

    def _free(self, known: Mapping[UUID, Job]) -> None:
        """Let go of what is given back, and of what the rows say we hold and we do not know of."""
        if not (self._given_back or self._has_forgotten):
            return
        with self._database.autocommit() as connection:
            delivery.let_go(connection, self._worker_id, self._given_back)
            if self._has_forgotten:
                delivery.free_forgotten(connection, self._worker_id, known.keys())
                self._has_forgotten = False

    def _receive(self, waiting: Iterable[_Waiting]) -> tuple[dict[UUID, Received], list[Refusal]]:
        """The rows of messages, and refusals of those whose data the store cannot hold."""
        unstorable: list[Refusal] = []

        def receive(group: Sequence[_Waiting]) -> dict[UUID, Received]:
            with self._database.autocommit() as connection:
                return submissions.receive(connection, self._worker_id, map(self._row, group))

        def refuse(each: _Waiting, error: Exception) -> None:
            log.error(
                "A message was refused: %s", said(error), extra={"job_id": each.ticket.job_id}
            )
            unstorable.append(_refusal(each.ticket, NOT_STORABLE))

        parts = by_halves(list(waiting), receive, refuse)
        return {id: row for part in parts for id, row in part.items()}, unstorable

    def _reject(self) -> None:
        """Write why messages cannot run. One that the store refuses is lost to all but the log."""

        def reject(refusals: Sequence[Refusal]) -> None:
            with self._database.autocommit() as connection:
                submissions.reject(connection, list(map(_rejected, refusals)))

        def refuse(refusal: Refusal, error: Exception) -> None:
            log.error("A refusal was refused: %s", said(error), extra={"job_id": refusal.job_id})

        by_halves(self._refusals, reject, refuse)

    def _sort(
        self, each: _Waiting, row: Received | None, known: Mapping[UUID, Job]
    ) -> Job | Doomed | None:
        """What a registered message is good for: a job, or nothing more."""
        job_id = each.arrival.job_id
        if row is None:
            self.refuse(_refusal(each.ticket, NO_REQUEST))
            return None
        if row.state is JobState.QUEUED and job_id in known and known[job_id].run is not None:
            self.give_back(job_id)  # it was taken from us, and our late run is to end first
        is_old = row.state is not JobState.QUEUED or job_id in known
        if is_old or not row.is_due:
            each.ticket.dropped()
            return None
        if row.model not in self._served:
            self.give_back(job_id)
            self._forward(row, each.ticket)
            return None
        try:
            return self._job(each, row)
        except RequestError as error:
            return Doomed(each.ticket, row.model, Ending.failed(error))

    def _job(self, each: _Waiting, row: Received) -> Job:
        """The job of a row. The row's request wins over the message's.

        Raises `RequestError` if it cannot run.
        """
        request, prepared = each.arrival.request, each.prepared
        if row.request is not None:
            request, prepared = _read(row), None
        if request is None:
            raise RequestError(str(RequestRemoved()))
        if prepared is None or row.model != each.arrival.model:
            prepared = self._prepare(request, row.model)
        if not isinstance(prepared, Prepared):
            raise prepared or NO_REQUEST
        limit_s = row.time_limit_s
        now_ns = self._now_ns()
        expires_ns = None if row.expires_in_s is None else now_ns + int(row.expires_in_s * 1e9)
        return Job(
            ticket=each.ticket,
            model=row.model,
            request=request,
            prepared=prepared,
            priority=row.priority,
            deadline=row.deadline,
            tenant=row.tenant,
            losses=row.losses,
            arrived_ns=each.arrived_ns,
            registered_ns=now_ns,
            expires_ns=expires_ns,
            time_limit_s=limit_s if limit_s is not None else each.ticket.time_limit_s,
            stream_events=row.stream_events,
        )

    def _prepare(self, request: Request, model: str | None) -> Prepared | RequestError | None:
        """None if the model is not served here."""
        served = self._served.get(model or "")
        if served is None:
            return None
        try:
            return prepare(request, served.tokenizer, served.settings, served.card)
        except RequestError as error:
            return error
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a tokenizer's panic is no Exception
            log.error("A prompt was refused: %s", place_of(error))
            return RequestError("The prompt cannot be turned into tokens.")

    def _row(self, each: _Waiting) -> submissions.Incoming:
        arrival = each.arrival
        if arrival.request is None or arrival.model is None:
            return submissions.Incoming(arrival.job_id)
        prepared = each.prepared if isinstance(each.prepared, Prepared) else None
        return submissions.Incoming(
            arrival.job_id,
            NewJob(
                id=arrival.job_id,
                model=arrival.model,
                kind=arrival.request.kind,
                url=arrival.request.url,
                request=arrival.request.raw,
                fingerprint=arrival.request.fingerprint,
                source="message",
                priority=arrival.priority,
                not_before=arrival.not_before,
                deadline=arrival.deadline,
                time_limit_s=arrival.time_limit_s,
                stream_events=arrival.stream_events,
                stored=arrival.request.sent.is_stored_chat,
                metadata=arrival.metadata,
                tenant=arrival.tenant,
                input_tokens=sum(map(len, prepared.prompts)) if prepared else None,
                max_output_tokens=prepared.max_tokens * arrival.request.num_sequences
                if prepared
                else None,
                max_attempts=self._max_attempts,
            ),
        )

    def _forward(self, row: Received, ticket: Ticket) -> None:
        """Send a wake-up to the queue of the workers that serve this model."""
        try:
            self._publisher.send(
                Message(
                    row.id,
                    Kind(row.kind),
                    row.model,
                    priority=row.priority,
                    tenant=row.tenant,
                )
            )
        except Unavailable:
            log.info("A message could not be forwarded; rescue will.", extra={"job_id": row.id})
        ticket.dropped()

    def _cancel_revoked(self) -> None:
        """A job that Celery revoked before it was claimed ends as cancelled."""
        while self._revoked:
            with self._database.begin() as connection:
                try:
                    id, kind = self._revoked[0]
                    cancellation.cancel_or_record(connection, id, kind, tenant=self._message_tenant)
                except (JobNotFound, JobStateConflict):
                    pass
            self._revoked.popleft()


def _leading(waiting: Iterable[_Waiting]) -> dict[UUID, _Waiting]:
    """Of the messages of each job the first that brings its request, or else the first."""
    leading: dict[UUID, _Waiting] = {}
    for each in waiting:
        first = leading.setdefault(each.arrival.job_id, each)
        if first.arrival.request is None and each.arrival.request is not None:
            leading[each.arrival.job_id] = each
    return leading


def _candidate(each: _Waiting, model: str) -> Candidate:
    """A message as the batcher is to see it, as far as it is known without its row."""
    arrival = each.arrival
    return Candidate(
        arrival.job_id,
        model,
        num_sequences=1,
        prompt_tokens=0,
        max_new_tokens=0,
        arrived_ns=each.arrived_ns,
        priority=arrival.priority,
        tenant=arrival.tenant,
    )


def _rejected(refusal: Refusal) -> RejectedJob:
    return RejectedJob(
        id=refusal.job_id,
        kind=refusal.kind,
        error_code=refusal.error.code,
        error_message=refusal.error.message,
        tenant=refusal.tenant,
    )


def _refusal(ticket: Ticket, error: RequestError) -> Refusal:
    acknowledge: Callable[[], object] = ticket.dropped
    request, tenant = ticket.arrival.request, ticket.arrival.tenant
    kind = request.kind if request else Kind.GENERATE
    return Refusal(ticket.job_id, kind, error, acknowledge, tenant)


def _read(row: Received) -> Request:
    """The request of a row; raises `RequestError`, whatever was written there."""
    try:
        return bodies.parse_stored(row.request, row.url, row.format)
    except ODD as error:
        log.error("A row was refused: %s", said(error), extra={"job_id": row.id})
        raise RequestError("The job's request cannot be read.") from None
