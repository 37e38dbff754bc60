"""What a job met: the batches it was claimed in and who else was, its workers, its replay."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from sqlalchemy import Connection, text

from app.store.reads import JobView
from app.store.tables import DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class MetBatch:
    """An admission batch that a job was claimed in; see `tables.batches`."""

    id: UUID
    engine: str
    close_reason: str
    num_jobs: int
    num_sequences: int
    wait_ms: float
    mates: tuple[UUID, ...]  #: other jobs of the same tenant that are not deleted


@dataclass(frozen=True, slots=True)
class MetWorker:
    """A worker that a job was with; see `tables.workers`."""

    id: UUID
    name: str
    host: str
    is_up: bool  #: its lease runs


@dataclass(frozen=True, slots=True)
class Surroundings:
    now: datetime  #: when this was read, on the database's clock
    batches: dict[UUID, MetBatch]
    workers: dict[UUID, MetWorker]
    num_workers: int  #: that serve its model and are up
    replayed_by: UUID | None


_IS_UP: Final = "stopped_at IS NULL AND lease_expires_at > now()"

# Tell the time, who could run a model's jobs, and which job replays this one.
_NOW: Final = text(f"""
    SELECT now(), (SELECT count(*) FROM workers WHERE {_IS_UP} AND :model = ANY(models)),
        (SELECT later.id FROM job_keys AS later WHERE later.replay_of = :job_id)
""")

# Batches, and who of a tenant was claimed with a job.
_BATCHES: Final = text("""
    SELECT id, engine, close_reason, num_jobs, num_sequences, wait_ms, ARRAY(
        SELECT mate.id FROM job_keys AS mate
        WHERE mate.id = ANY(batches.job_ids) AND mate.tenant = :tenant AND mate.id <> :job_id
        ORDER BY mate.id
    ) AS mates
    FROM batches WHERE id = ANY(CAST(:ids AS uuid[]))
""")

_WORKERS: Final = text(f"""
    SELECT id, name, host, {_IS_UP} AS is_up FROM workers WHERE id = ANY(CAST(:ids AS uuid[]))
""")


def of_job(connection: Connection, job: JobView, *, tenant: str = DEFAULT_TENANT) -> Surroundings:
    """To be read after the job, each statement in a transaction of its own: nothing of the job is
    then later than `now`."""
    asked = {"job_id": job.id, "model": job.model}
    [(now, num_workers, replayed_by)] = connection.execute(_NOW, asked).all()
    batch_ids = [attempt.batch_id for attempt in job.attempts]
    worker_ids = [attempt.worker_id for attempt in job.attempts]
    if job.worker_id is not None:
        worker_ids.append(job.worker_id)
    return Surroundings(
        now,
        _batches(connection, batch_ids, job.id, tenant),
        {row.id: MetWorker(*row) for row in connection.execute(_WORKERS, {"ids": worker_ids})},
        num_workers,
        replayed_by,
    )


def _batches(
    connection: Connection, ids: list[UUID], job_id: UUID, tenant: str
) -> dict[UUID, MetBatch]:
    given = {"ids": ids, "job_id": job_id, "tenant": tenant}
    return {
        row.id: MetBatch(**{**row._mapping, "mates": tuple(row.mates)})
        for row in connection.execute(_BATCHES, given)
    }
