"""Rows for the tests: jobs as producers make them, and workers that claim and finish them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, TypeVar
from uuid import UUID, uuid4

from sqlalchemy import text

from app.jobs import AttemptOutcome, CloseReason, JobState, Kind
from app.store import claims, notices, reads, releases, submissions, workers
from app.store.claims import Claimed, Finished, Member, NewBatch
from app.store.database import Database
from app.store.reads import JobView
from app.store.releases import Release
from app.store.submissions import NewJob
from app.store.tables import metadata
from tests.memory_store.database import MemoryConnection

T = TypeVar("T")

MODEL = "smollm2"


def new_job(**given: Any) -> NewJob:
    """A job as the API makes it."""
    defaults: dict[str, Any] = {
        "id": uuid4(),
        "model": MODEL,
        "kind": Kind.GENERATE,
        "url": "/v1/completions",
        "request": {"prompt": "A mill"},
        "fingerprint": "f00d",
        "source": "api",
    }
    return NewJob(**defaults | given)


def insert(database: Database, *jobs: NewJob) -> list[UUID]:
    """Write jobs; returns their ids."""
    with database.begin() as connection:
        return [row.id for row in submissions.insert_jobs(connection, jobs)]


def insert_sent(database: Database, *jobs: NewJob) -> list[UUID]:
    """Write jobs whose messages are sent."""
    ids = [job.id for job in jobs]
    with database.begin() as connection:
        submissions.insert_jobs(connection, jobs, sent=ids)
    return ids


def view(database: Database, job_id: UUID) -> JobView:
    with database.begin() as connection:
        [job] = reads.find(connection, [job_id])
    assert isinstance(job, JobView)
    return job


def column(database: Database, job_id: UUID, name: str) -> Any:
    """One column of a job's row."""
    with database.begin() as connection:
        return connection.scalar(text(f"SELECT {name} FROM jobs WHERE id = :id"), {"id": job_id})


def where_it_is(database: Database, words: str) -> set[str]:
    """The tables with a row that holds these words in any column."""
    tables = tuple(metadata.tables)
    with database.begin() as connection:
        return {
            table
            for table in tables
            if connection.scalar(
                text(f"SELECT count(*) FROM {table} AS t WHERE strpos(t::text, :words) > 0"),
                {"words": words},
            )
        }


def rewrite(database: Database, assignment: str, job_id: UUID | None = None) -> None:
    """Change rows of open jobs behind the store's back, to let time pass for them."""
    where = "true" if job_id is None else "id = :id"
    with database.begin() as connection:
        connection.execute(text(f"UPDATE open_jobs SET {assignment} WHERE {where}"), {"id": job_id})


def accept_earlier(database: Database, ids: Sequence[UUID], earlier: timedelta) -> None:
    """Change when jobs were accepted, in all their rows."""
    with database.begin() as connection:
        for table, key in (
            ("job_keys", "id"), ("requests", "job_id"), ("open_jobs", "id"), ("attempts", "job_id"),
            ("results", "job_id"),
        ):  # fmt: skip
            connection.execute(
                text(
                    f"UPDATE {table} SET created_at = created_at - :earlier WHERE {key} = ANY(:ids)"
                ),
                {"earlier": earlier, "ids": list(ids)},
            )


def end_lease(database: Database, worker_id: UUID) -> None:
    """Let a worker's lease run out."""
    with database.begin() as connection:
        connection.execute(
            text("UPDATE workers SET lease_expires_at = now() - interval '1 s' WHERE id = :id"),
            {"id": worker_id},
        )


def counting(settled: Iterable[claims.Settled]) -> set[UUID]:
    """The attempts whose results are their jobs'."""
    return {each.attempt_id for each in settled if each.counts}


@dataclass
class Worker:
    """A registered worker that does as it is told."""

    database: Database
    id: UUID = field(default_factory=uuid4)

    @classmethod
    def registered(cls, database: Database, lease_s: float = 30.0) -> Worker:
        worker = cls(database)
        with database.begin() as connection:
            workers.register_worker(
                connection,
                workers.NewWorker(
                    id=worker.id,
                    name="worker@mill",
                    host="mill",
                    pid=1,
                    models=[MODEL],
                    device="cpu",
                    price_id="cpu",
                    currency="EUR",
                    price_per_device_hour=Decimal("0.036"),
                ),
                lease_s,
            )
        return worker

    def receive(self, *arrivals: submissions.Incoming) -> dict[UUID, submissions.Received]:
        with self.database.begin() as connection:
            return submissions.receive(connection, self.id, arrivals)

    def batch(self) -> NewBatch:
        return NewBatch(
            id=uuid4(),
            worker_id=self.id,
            model=MODEL,
            engine="stub",
            close_reason=CloseReason.SIZE,
            wait_ms=5.0,
        )

    def claim(self, ids: Iterable[UUID]) -> list[Claimed]:
        with self.database.begin() as connection:
            return claims.claim(connection, self.batch(), [Member(id, uuid4()) for id in ids])

    def finish(self, *finished: Finished) -> set[UUID]:
        told = notices.ended([each.job_id for each in finished])
        with self.database.autocommit(then=told) as connection:
            return counting(claims.finish(connection, finished))

    def complete(self, claimed: Sequence[Claimed]) -> set[UUID]:
        return self.finish(*(completed(each) for each in claimed))

    def release(self, claimed: Claimed, **given: Any) -> JobState | None:
        """Where the job went; None if it was not this worker's any more."""
        defaults = {"outcome": AttemptOutcome.RELEASED, "charged": False}
        given = defaults | given
        with self.database.begin() as connection:
            released = releases.release(
                connection,
                [
                    Release(
                        job_id=claimed.job_id,
                        attempt_id=claimed.attempt_id,
                        created_at=claimed.created_at,
                        **given,
                    )
                ],
            )
        return released[0].state if released else None

    def heartbeat(self, lease_s: float = 30.0) -> workers.Heartbeat:
        with self.database.begin() as connection:
            return workers.heartbeat(connection, self.id, lease_s)

    def stop(self) -> None:
        with self.database.begin() as connection:
            workers.stop_worker(connection, self.id)


def created_at(connection: Any, job_id: UUID) -> datetime:
    """Of a job in either store, or any time if there is none."""
    if isinstance(connection, MemoryConnection):
        job = connection.jobs.get(job_id)
        return job["created_at"] if job else datetime.now(UTC)
    [job] = reads.find(connection, [job_id]) or [None]
    return job.created_at if job else datetime.now(UTC)


def completed(claimed: Claimed, **given: Any) -> Finished:
    """The record of a successful attempt."""
    defaults: dict[str, Any] = {
        "job_id": claimed.job_id,
        "attempt_id": claimed.attempt_id,
        "created_at": claimed.created_at,
        "state": JobState.COMPLETED,
        "response": {"choices": []},
        "device_ns": 1_000,
    }
    return Finished(**defaults | given)


def at_once(*calls: Callable[[], T]) -> list[T]:
    """Run each call in a thread of its own, all let go at the same moment."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], T]) -> T:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))
