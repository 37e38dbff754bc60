"""The ledger: this worker's claims and what became of them, in the store.

Claim before the engine, commit after it, and only then the ack.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from uuid import UUID

from app.errors import GristmillError, Unavailable
from app.jobs import AttemptOutcome, JobState
from app.store import claims
from app.store.claims import Member, NewBatch, Release
from app.store.database import Database
from app.worker.settlement import Settlement, batch_stats, summary
from app.worker.work import TIMED_OUT, Batch, Ending, Job, Run

log = logging.getLogger(__name__)

Tell = Callable[[], None]
"""Tells Celery how a job ended, and acks its message."""


class Ledger:
    """Owns the claim, finish and release statements of one worker. Only the runner calls it."""

    def __init__(
        self,
        *,
        worker_id: UUID,
        database: Database,
        engines: dict[str, str],
        settlement: Settlement,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`engines` names the engine of each served model."""
        self._worker_id = worker_id
        self._database = database
        self._engines = engines
        self._settlement = settlement
        self._now_ns = now_ns

    def claim(self, batch: Batch, jobs: Sequence[Job]) -> list[Job]:
        """Claim a batch in one statement; the jobs that were granted now have a run.

        After `Unavailable` its fate is unknown: the same call is to be made again, and then finds
        what it got the first time.
        """
        members = [Member(job.id, job.attempt_id, job.num_sequences) for job in jobs]
        with self._database.autocommit() as connection:
            answer = claims.claim(connection, self._new_batch(batch), members)
        grants = {grant.job_id: grant for grant in answer}
        claimed_ns = self._now_ns()
        granted = [job for job in jobs if job.id in grants]
        for job in granted:
            job.run = Run(
                attempt_id=job.attempt_id,
                batch=batch,
                claimed_at=grants[job.id].claimed_at,
                claimed_ns=claimed_ns,
                generations=[None] * job.num_sequences,
            )
        batch.num_jobs = len(granted)
        return granted

    def _new_batch(self, batch: Batch) -> NewBatch:
        return NewBatch(
            id=batch.id,
            worker_id=self._worker_id,
            model=batch.model,
            engine=self._engines[batch.model],
            close_reason=batch.reason,
            wait_ms=batch.wait_ns / 1e6,
        )

    def commit(self, over: Sequence[Job]) -> list[Tell]:
        """Commit ended jobs together; returns what Celery is then to be told.

        Raises `Unavailable` with nothing lost: the same call may be made again. If the store
        refuses one of the records for good, the others do not suffer for it.
        """
        try:
            committed = self._finish(over)
        except Unavailable:
            raise
        except GristmillError as error:
            if len(over) > 1:
                return [tell for job in over for tell in self.commit([job])]
            log.error("A result was refused: %s", error, extra={"job_id": over[0].id})
            run = over[0].claimed_run
            assert run.record is not None
            run.record = self._settlement.without_response(run.record)
            committed = self._finish(over)
        return [_news(job, job.claimed_run.attempt_id in committed) for job in over]

    def _finish(self, over: Iterable[Job]) -> set[UUID]:
        records, stats = [], {}
        for job in over:
            run = job.claimed_run
            run.record = run.record or self._settlement.settle(job)
            records.append(run.record)
            stats[run.batch.id] = batch_stats(run.batch)
        with self._database.autocommit() as connection:
            return claims.finish(connection, records, list(stats.values()))

    def release(self, jobs: Sequence[Job]) -> None:
        """Give claimed jobs back to the queue, uncharged."""
        if not jobs:
            return
        with self._database.autocommit() as connection:
            claims.release(
                connection,
                [
                    Release(
                        job_id=job.id,
                        attempt_id=job.claimed_run.attempt_id,
                        outcome=AttemptOutcome.RELEASED,
                        charged=False,
                        device_ns=job.claimed_run.device_ns,
                    )
                    for job in jobs
                ],
            )


def _news(job: Job, committed: bool) -> Tell:
    """How Celery hears of a committed job; one that was fenced out is somebody else's to tell."""
    record = job.claimed_run.record
    assert record is not None
    if not committed:
        return job.ticket.dropped
    runtime_s = record.device_ns / 1e9
    if record.state is JobState.COMPLETED:
        return partial(job.ticket.succeeded, summary(job, record), runtime_s)
    if job.claimed_run.ending is TIMED_OUT:
        return job.ticket.timed_out
    ending = job.claimed_run.ending or Ending(
        record.state, record.error_code or "", record.error_message or ""
    )
    return partial(job.ticket.failed, ending.code, ending.message, runtime_s)
