"""The ledger: this worker's claims and what became of them, in the store.

Claim before the engine, commit after it, and only then the ack (`telling`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from uuid import UUID

from app.errors import NotStorable
from app.jobs import AttemptOutcome, CloseReason
from app.store import claims, notices
from app.store.claims import (
    BatchStats,
    Claimed,
    Finished,
    Member,
    NewBatch,
    Settled,
    Taken,
)
from app.store.database import Database
from app.store.releases import Release, release
from app.worker.account import Account, Settling, Spent
from app.worker.isolation import ODD, by_halves, said
from app.worker.settlement import Settlement, batch_stats
from app.worker.work import Batch, Doomed, Job, Run, Take

log = logging.getLogger(__name__)


class Ledger:
    """Owns the claim, finish and release statements of one worker. Only the runner calls it."""

    def __init__(
        self,
        *,
        worker_id: UUID,
        database: Database,
        engines: dict[str, str],
        settlement: Settlement,
        account: Account,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`engines` names the engine of each served model."""
        self._worker_id = worker_id
        self._database = database
        self._engines = engines
        self._settlement = settlement
        self._account = account
        self._now_ns = now_ns

    def claim(self, batch: Batch, jobs: Sequence[Job]) -> list[Job]:
        """Claim a batch in one statement; the jobs that were granted now have a run.

        After `Unavailable` its fate is unknown: the same call is to be made again, and then finds
        what it got the first time.
        """
        new = self._new_batch(batch)

        def claim(group: Sequence[Job]) -> list[Claimed]:
            members = [Member(job.id, job.attempt_id, job.num_sequences) for job in group]
            with self._database.autocommit() as connection:
                return claims.claim(connection, new, members)

        answer = [grant for part in by_halves(jobs, claim, _say_refused) for grant in part]
        grants = {grant.job_id: grant for grant in answer}
        granted = [job for job in jobs if job.id in grants]
        self._open(batch, granted, grants)
        batch.num_jobs = len(granted)
        return granted

    def take(self, take: Take) -> tuple[list[Taken], list[UUID]]:
        """Claim a batch that nobody here has read, in one statement; what was granted, and the jobs
        that the statement cannot stand, whose attempts may be open.

        After `Unavailable` its fate is unknown, as that of a claim.
        """
        new, refused = self._new_batch(take.batch), list[UUID]()

        def claim(group: Sequence[UUID]) -> list[Taken]:
            members = [Member(id, take.attempts[id]) for id in group]
            with self._database.autocommit() as connection:
                return claims.take(connection, new, members)

        def refuse(id: UUID, error: Exception) -> None:
            log.error("A job's row was refused: %s", said(error), extra={"job_id": id})
            refused.append(id)

        parts = by_halves([*take.attempts], claim, refuse)
        taken = {each.row.id: each for part in parts for each in part}
        return [taken[id] for id in take.attempts if id in taken], refused

    def begin(self, batch: Batch, jobs: Sequence[Job], taken: Sequence[Taken]) -> None:
        """The jobs of what was taken have a run now; the rest of it cannot run."""
        self._open(batch, jobs, {each.row.id: each.claimed for each in taken})
        batch.num_jobs = len(taken)
        batch.num_claimed = sum(job.num_sequences for job in jobs) + len(taken) - len(jobs)

    def _open(self, batch: Batch, jobs: Sequence[Job], grants: Mapping[UUID, Claimed]) -> None:
        claimed_ns = self._now_ns()
        for job in jobs:
            job.run = Run(
                attempt_id=job.attempt_id,
                number=grants[job.id].number,
                batch=batch,
                claimed_at=grants[job.id].claimed_at,
                created_at=grants[job.id].created_at,
                claimed_ns=claimed_ns,
                generations=[None] * job.num_sequences,
            )
        self._account.opened(job.attempt_id for job in jobs)

    def _new_batch(self, batch: Batch) -> NewBatch:
        return NewBatch(
            id=batch.id,
            worker_id=self._worker_id,
            model=batch.model,
            engine=self._engines[batch.model],
            close_reason=batch.reason,
            wait_ms=batch.wait_ns / 1e6,
        )

    def fail(self, doomed: Doomed) -> bool:
        """End a job that cannot run; returns whether it was still ours to end, and could be.

        Raises `Unavailable` with nothing lost: the same call may be made again.
        """
        batch = Batch(doomed.batch_id, doomed.model, CloseReason.SIZE, 0)
        member = Member(doomed.id, doomed.attempt_id)
        try:
            with self._database.autocommit(then=notices.ended([doomed.id])) as connection:
                claimed = claims.claim(connection, self._new_batch(batch), [member])
                if not claimed:  # if by an end of the call before, it is told now
                    return False
                record = Finished(
                    job_id=doomed.id,
                    attempt_id=doomed.attempt_id,
                    created_at=claimed[0].created_at,
                    state=doomed.ending.state,
                    error_code=doomed.ending.code,
                    error_message=doomed.ending.message,
                )
                return any(each.counts for each in claims.finish(connection, [record]))
        except NotStorable as error:
            _say_refused(doomed, error)
            return False

    def commit(self, over: Sequence[Job]) -> set[UUID]:
        """Commit ended jobs together and tell those who wait; returns the attempts that counted.
        The others were not ours any more, or their rows take no end at all.

        Raises `Unavailable` with nothing lost: the same call may be made again. If the store
        refuses one of the records for good, that job fails, and the others do not suffer for it.
        """
        parts = by_halves(over, self._finish, self._withhold)
        withheld = [job for job in over if job.claimed_run.is_withheld]
        return set().union(*parts, *by_halves(withheld, self._finish, self._is_refused))

    def _finish(self, over: Sequence[Job]) -> set[UUID]:
        records, stats = [], {}
        for job in over:
            run = job.claimed_run
            run.record = run.record or self._record(job)
            records.append(run.record)
            stats[run.batch.id] = batch_stats(run.batch)
        told = notices.ended([job.id for job in over])
        with self._settling(over) as settling, self._database.autocommit(then=told) as connection:
            settling.rows = claims.finish(
                connection, records, list(stats.values()), window_number=settling.window_number
            )
        return {row.attempt_id for row in settling.rows if row.counts}

    def _settling(self, jobs: Iterable[Job]) -> AbstractContextManager[Settling]:
        runs = (job.claimed_run for job in jobs)
        return self._account.settling({run.attempt_id: self._spent(run) for run in runs})

    def _spent(self, run: Run) -> Spent:
        return Spent(run.spent_ns, self._settlement.paid(run).spent_nj or 0)

    def _record(self, job: Job) -> Finished:
        try:
            return self._settlement.settle(job)
        except ODD as error:
            raise NotStorable(f"It is no answer ({said(error)}).") from None

    def _withhold(self, job: Job, error: Exception) -> None:
        """The store refuses this answer: the job fails without it, and is billed as it was."""
        log.error("A result was refused: %s", said(error), extra={"job_id": job.id})
        run = job.claimed_run
        run.record = self._settlement.without_response(job)
        run.is_withheld = True

    def _is_refused(self, job: Job, error: Exception) -> None:
        _say_refused(job, error)
        run = job.claimed_run
        self._account.refused(run.attempt_id, self._spent(run))

    def release(self, jobs: Sequence[Job]) -> None:
        """Give claimed jobs back to the queue, uncharged: what they took is waste."""
        if not jobs:
            return
        releases = [self._given_back(job.id, job.claimed_run) for job in jobs]
        with self._settling(jobs) as settling, self._database.autocommit() as connection:
            settling.rows = [
                Settled(each.attempt_id, 0, each.wasted_ns, 0, each.wasted_nj, counts=False)
                for each in release(
                    connection,
                    releases,
                    _batches_of(jobs),
                    window_number=settling.window_number,
                )
            ]

    def _given_back(self, job_id: UUID, run: Run) -> Release:
        paid = self._settlement.paid(run)
        return Release(
            job_id=job_id,
            attempt_id=run.attempt_id,
            created_at=run.created_at,
            outcome=AttemptOutcome.RELEASED,
            charged=False,
            wasted_ns=run.spent_ns,
            wasted_nj=paid.spent_nj,
            energy_method=paid.method,
        )


def _batches_of(jobs: Iterable[Job]) -> list[BatchStats]:
    batches = {job.claimed_run.batch.id: job.claimed_run.batch for job in jobs}
    return [batch_stats(batch) for batch in batches.values()]


def _say_refused(job: Job | Doomed, error: Exception) -> None:
    log.error("A job's row was refused: %s", said(error), extra={"job_id": job.id})
