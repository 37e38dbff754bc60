"""Lines of a batch become jobs: a page at a time, and no more than others leave room for.

    at most `job_batches.max_open_lines` of a batch are jobs that have not ended
    and no more than the limits of its tenant leave: the rest waits
    the queue is filled to the half of its limits; the other half is everybody else's
    lines go behind live and default work, by `job_batches.priority`

A page's jobs and what is noted of its lines are one transaction. Memory holds a page.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final
from uuid import UUID

from app.batches import LineOutcome, outcome_without_job
from app.config.settings import Settings
from app.errors import (
    ModelNotFound,
    NotStorable,
    ObjectMissing,
    QueueFull,
    QuotaExceeded,
    RequestError,
    RequestTooLarge,
    UrlNotFound,
)
from app.files import key_of
from app.intake.admission import Admission
from app.intake.batches import lines
from app.intake.batches.input_file import PART_BYTES, Row, rows
from app.intake.batches.lines import WrongLine
from app.intake.submit import Submission, Submitter
from app.objects import Objects
from app.requests.bodies import Url
from app.store import batch_work, submissions
from app.store.batch_work import FedLine
from app.store.counts import Load
from app.store.database import Database
from app.store.isolation import Connection, apart
from app.store.job_batches import BatchView
from app.store.submissions import NewJob

PAGE: Final = 200
"""Lines of a page."""

PAGE_BYTES: Final = 1_000_000
SLICE_S: Final = 0.3
"""Where a page ends sooner: large lines take long to check, and others have their turns."""

MIN_PART_BYTES: Final = 50_000
"""Read at once where only a few lines have room."""

SPARE_BYTES: Final = 10_000
"""A line is so much longer than the request in it, at most."""


@dataclass
class _Page:
    """What became of the next lines, and where the ones behind them begin."""

    fed_bytes: int
    fed_rows: int
    lines: list[FedLine] = field(default_factory=list)
    jobs: list[NewJob] = field(default_factory=list)
    num_bytes: int = 0

    @property
    def load(self) -> Load:
        tokens = sum((job.input_tokens or 0) + (job.max_output_tokens or 0) for job in self.jobs)
        return Load(len(self.jobs), tokens)


class Feed:
    """Not for several threads at once."""

    def __init__(
        self, settings: Settings, database: Database, objects: Objects, submitter: Submitter
    ) -> None:
        self._settings = settings
        self._database = database
        self._objects = objects
        self._submitter = submitter
        api = settings.api
        half = Load(max(1, api.max_queued_jobs // 2), max(1, api.max_queued_tokens // 2))
        self._admission = Admission(database, half)
        self._longest = api.max_body_bytes + SPARE_BYTES
        self._sizes: dict[UUID, int] = {}  #: lines of a batch's next page; PAGE at first

    def rows_of(
        self, batch: BatchView, *, start: int = 0, number: int = 1, part: int = PART_BYTES
    ) -> Iterator[Row]:
        """The rows of its input, from a place on."""
        assert batch.input_file_id is not None
        key = key_of(batch.input_file_id)

        def read(at: int, length: int) -> bytes:
            return self._objects.read_range(key, at, length)

        return rows(
            read, batch.input_bytes, start=start, number=number, longest=self._longest, part=part
        )

    def forget_others(self, held: Set[UUID]) -> None:
        """Keep in mind what is known of these batches alone."""
        for batch_id in self._sizes.keys() - held:
            del self._sizes[batch_id]

    def step(self, batch: BatchView, keeper_id: UUID, lease_s: float) -> bool:
        """Feed a page, if there is room for one; whether there was anything to do.

        Raises `NotHeld`, `Unavailable` and `StorageUnavailable`.
        """
        if batch.fed >= batch.counts.total:
            return False
        outcome = outcome_without_job(batch.state, is_over=batch.is_over)
        most = size = self._sizes.get(batch.id, PAGE)
        if outcome is None:
            running = batch.fed - batch.counts.ended
            most = min(most, self._settings.job_batches.max_open_lines - running)
            if most <= 0 or not self._has_room():
                return False
        try:
            page = self._read(batch, most, outcome)
        except ObjectMissing:
            if outcome is None:
                raise  # it may come back in the batch's time
            page = _unread(batch, most, outcome)
        room = self._admission.admitted(page.load) if page.jobs else nullcontext()  # or needs none
        try:
            with room:
                self._write(batch, page, outcome, keeper_id, lease_s)
        except QuotaExceeded:  # of its tenant: what has ended gives back
            self._sizes[batch.id] = max(1, size // 2)
            return False
        except QueueFull:
            # A smaller page may fit. One line that never will goes into an empty queue.
            if len(page.lines) > 1 or self._admission.queued().jobs:
                self._sizes[batch.id] = max(1, size // 2)
                return False
            self._write(batch, page, None, keeper_id, lease_s)
        self._sizes[batch.id] = min(PAGE, 2 * size)
        return True

    def _has_room(self) -> bool:
        try:
            self._admission.expect_room(1)
        except QueueFull:
            return False
        return True

    # ── reading ──────────────────────────────────────────────────────────────────────────────

    def _read(self, batch: BatchView, most: int, outcome: LineOutcome | None) -> _Page:
        page = _Page(batch.fed_bytes, batch.fed_rows)
        until = time.monotonic() + SLICE_S
        expected = most * batch.input_bytes // batch.counts.total
        part = min(PART_BYTES, max(MIN_PART_BYTES, expected))
        start, number = page.fed_bytes, page.fed_rows + 1
        for row in self.rows_of(batch, start=start, number=number, part=part):
            page.fed_bytes, page.fed_rows = row.end, row.number
            if not row.is_blank:
                self._take(batch, page, row, outcome)
            is_full = len(page.lines) >= most or page.num_bytes > PAGE_BYTES
            if is_full or time.monotonic() > until:
                break
        return page

    def _take(self, batch: BatchView, page: _Page, row: Row, outcome: LineOutcome | None) -> None:
        raw = row.raw or b""
        page.num_bytes += len(raw)
        if outcome is not None:
            page.lines.append(FedLine(row.number, lines.custom_id_of(raw), outcome=outcome))
            return
        try:
            if row.raw is None:
                raise lines.TOO_LONG
            job, custom_id = self._job(batch, raw)
        except WrongLine as wrong:
            error = _error(wrong.code, str(wrong), wrong.param)
            page.lines.append(_refused(row.number, lines.custom_id_of(raw), error))
        except RequestError as refused:
            page.lines.append(_refused(row.number, lines.custom_id_of(raw), _error_of(refused)))
        else:
            page.jobs.append(job)
            page.lines.append(FedLine(row.number, custom_id, job_id=job.id))

    def _job(self, batch: BatchView, raw: bytes) -> tuple[NewJob, str]:
        """Raises `WrongLine` and `RequestError`."""
        line = lines.parse(raw, batch.door, Url(batch.url))
        submission = Submission.model_construct(  # `lines` has looked at it
            url=batch.url,
            body=line.body,
            priority=self._settings.job_batches.priority,
            deadline=batch.expires_at,
        )
        job = self._submitter.check(submission, tenant=batch.tenant, unknown_fields="ignore")
        return job, line.custom_id

    # ── writing ──────────────────────────────────────────────────────────────────────────────

    def _write(
        self,
        batch: BatchView,
        page: _Page,
        outcome: LineOutcome | None,
        keeper_id: UUID,
        lease_s: float,
    ) -> None:
        wanted = self._submitter.sender.wanted(page.jobs)
        sent: list[NewJob] = []
        tenants = self._submitter.tenants
        bounded = tenants.bounded({job.tenant for job in page.jobs})
        with self._database.begin() as connection:
            now = batch_work.held(connection, keeper_id, lease_s, batch.id)
            changed = outcome_without_job(now.state, is_over=now.is_over) is not outcome
            if now.fed_bytes != batch.fed_bytes or changed:
                return  # cancelled meanwhile, say: the next look is another
            fed = page.lines
            if page.jobs:
                sent, refused = _insert(connection, page.jobs, wanted)
                tenants.enforce(connection, bounded, self._database.now())
                fed = [
                    _refused(line.number, line.custom_id, refused[line.job_id])
                    if line.job_id in refused
                    else line
                    for line in fed
                ]
            batch_work.feed(connection, now, fed, fed_bytes=page.fed_bytes, fed_rows=page.fed_rows)
        self._submitter.sender.send(sent, num_left=len(page.jobs) - len(sent))


def _unread(batch: BatchView, most: int, outcome: LineOutcome) -> _Page:
    """The next lines of a file that is gone, by their numbers alone."""
    behind = batch.fed_rows
    last = behind + min(most, batch.counts.total - batch.fed)
    unknown = [FedLine(number, "", outcome=outcome) for number in range(behind + 1, last + 1)]
    return _Page(batch.fed_bytes, last, unknown)


def _insert(
    connection: Connection, jobs: Sequence[NewJob], wanted: set[UUID]
) -> tuple[list[NewJob], dict[UUID | None, dict[str, Any]]]:
    """The jobs whose messages are to be sent, and the errors of those that cannot be stored."""

    def insert(connection: Connection, part: Sequence[NewJob]) -> Sequence[submissions.Inserted]:
        return submissions.insert_jobs(connection, part, wanted)

    rows = apart(insert, connection, jobs)
    sent = [
        job
        for job, row in zip(jobs, rows, strict=True)
        if isinstance(row, submissions.Inserted) and row.is_sent
    ]
    sentence = "The store cannot hold a value of this request."
    refused: dict[UUID | None, dict[str, Any]] = {
        job.id: _error(NotStorable.code, sentence, None)
        for job, row in zip(jobs, rows, strict=True)
        if isinstance(row, NotStorable)
    }
    return sent, refused


def _refused(number: int, custom_id: str, error: dict[str, Any]) -> FedLine:
    return FedLine(number, custom_id, outcome=LineOutcome.ERRORED, error=error)


def _error(
    code: str, message: str, param: str | None, status: int = HTTPStatus.BAD_REQUEST
) -> dict[str, Any]:
    return {"status": int(status), "code": code, "message": message, "param": param}


def _error_of(refused: RequestError) -> dict[str, Any]:
    status = HTTPStatus.BAD_REQUEST
    if isinstance(refused, ModelNotFound | UrlNotFound):
        status = HTTPStatus.NOT_FOUND
    elif isinstance(refused, RequestTooLarge):
        status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    param = refused.param and refused.param.removeprefix("body.")
    return _error(refused.code, refused.message, param, status)
