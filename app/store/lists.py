"""Which jobs a list is of, newest first: ids found by index, whatever the filters.

Without labels a page takes the newest of each state, or of the error, by its index and merges them,
so it costs the same wherever it lies. With labels it depends on how many jobs have them: few are
all looked at, found by the index of labels; where there are many, the newest are looked through.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Select,
    Text,
    Tuple,
    Uuid,
    and_,
    column,
    func,
    literal,
    select,
    text,
    tuple_,
    union_all,
)
from sqlalchemy.dialects.postgresql import JSONB

from app.errors import JobNotFound
from app.jobs import JobState
from app.store.lookup import OPEN_MODELS
from app.store.tables import DEFAULT_TENANT, Stamp, jobs, open_jobs, results

MANY: Final = 10_000
"""Jobs with the same labels that are still all looked at for a page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """What all jobs of a list have in common. Left out is any."""

    states: Collection[JobState] = tuple(JobState)
    model: str | None = None
    error_code: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)  #: among others
    idempotency_key: str | None = None
    since: datetime | None = None  #: accepted then or later
    until: datetime | None = None  #: accepted before
    is_asked: bool | None = None  #: whether it was cancelled by its caller while it ran


ANY: Final = Filter()


def newest(
    connection: Connection,
    given: Filter,
    *,
    after: UUID | None = None,
    limit: int,
    tenant: str = DEFAULT_TENANT,
) -> list[UUID]:
    """The ids of a tenant's jobs that pass the filter, newest first, beginning after the job
    `after`. Raises `JobNotFound` if there is none."""
    here = place(connection, after, tenant) if after else None
    if given.idempotency_key is not None:
        found = [_matching(given, here, tenant, _of_key(given, tenant))]
    elif given.metadata and are_few(connection, given.metadata, tenant):
        found = [_matching(given, here, tenant, labelled(given.metadata, tenant))]
    else:
        walked = [each for state in given.states for each in _parts(connection, given, state)]
        found = [_walk(part, here, tenant, state).limit(limit) for part, state in walked]
    if not found:
        return []
    merged = union_all(*(each.subquery().select() for each in found)).subquery()
    page = select(merged.c.id).order_by(merged.c.created_at.desc(), merged.c.id.desc()).limit(limit)
    return list(connection.scalars(page))


def place(connection: Connection, job_id: UUID, tenant: str) -> Tuple:
    """Where a job stands in a list. Raises `JobNotFound`."""
    created_at = connection.scalar(
        select(jobs.c.created_at).where(jobs.c.id == job_id, jobs.c.tenant == tenant)
    )
    if created_at is None:
        raise JobNotFound()
    return tuple_(literal(created_at, Stamp), literal(job_id, Uuid))


_OPEN_MODELS: Final = text(f"{OPEN_MODELS} SELECT model FROM found WHERE model IS NOT NULL")


def _parts(connection: Connection, given: Filter, state: JobState) -> list[tuple[Filter, JobState]]:
    """What can be walked by one index: of queued jobs those of one model."""
    if state is not JobState.QUEUED or given.model is not None or given.error_code is not None:
        return [(given, state)]
    models = connection.scalars(_OPEN_MODELS)
    return [(replace(given, model=model), state) for model in models]


def _walk(given: Filter, here: Tuple | None, tenant: str, state: JobState) -> Select[Any]:
    """The jobs of one state, in the order of an index of `open_jobs` or of `results`."""
    is_ended = state.is_final or given.error_code is not None
    table, id = (results, results.c.job_id) if is_ended else (open_jobs, open_jobs.c.id)
    query = select(id.label("id"), table.c.created_at).where(
        table.c.tenant == tenant, table.c.state == state, *_conditions(table, id, given, here)
    )
    if given.error_code is not None:
        query = query.where(results.c.error_code == given.error_code)
    elif state is JobState.RUNNING:  # few among many that are queued: by the index of workers
        query = query.where(open_jobs.c.worker_id.is_not(None))
    if given.metadata:
        query = query.where(table.c.metadata.contains(given.metadata))
    return query.order_by(table.c.created_at.desc(), id.desc())


def _matching(given: Filter, here: Tuple | None, tenant: str, some: FromClause) -> Select[Any]:
    """Those of some jobs that pass the filter."""
    query = select(some.c.id, some.c.created_at).where(
        some.c.tenant == tenant,
        some.c.state.in_(given.states),
        *_conditions(some, some.c.id, given, here),
    )
    if given.metadata and "metadata" in some.c:
        query = query.where(some.c.metadata.contains(given.metadata))
    if given.error_code is not None:
        is_it = and_(results.c.job_id == some.c.id, results.c.created_at == some.c.created_at)
        query = query.join(results, is_it).where(results.c.error_code == given.error_code)
    return query


def _conditions(
    rows: FromClause, id: ColumnElement[UUID], given: Filter, here: Tuple | None
) -> list[ColumnElement[bool]]:
    """What is asked of the columns that all these tables have, and of the mark."""
    asked: list[ColumnElement[bool]] = []
    if given.model is not None:
        asked.append(rows.c.model == given.model)
    if given.since is not None:
        asked.append(rows.c.created_at >= given.since)
    if given.until is not None:
        asked.append(rows.c.created_at < given.until)
    if given.is_asked is not None:
        asked.append(rows.c.cancel_requested_at.is_not(None) == given.is_asked)
    if here is not None:
        asked.append(tuple_(rows.c.created_at, id) < here)
    return asked


def _of_key(given: Filter, tenant: str) -> FromClause:
    """The job of an idempotency key."""
    key = given.idempotency_key
    return select(jobs).where(jobs.c.tenant == tenant, jobs.c.idempotency_key == key).subquery()


def labelled(metadata: Mapping[str, str], tenant: str) -> FromClause:
    """A tenant's jobs with these labels, by the index of labels: one more than `MANY` at most.

    In a function that runs as the tables' owner, since whoever row-level security holds for cannot
    use an index for `@>`: it may look at a row's labels only when it is known whose the row is.
    """
    found = func.labelled(tenant, literal(dict(metadata), JSONB), MANY + 1)
    return found.table_valued(
        column("id", Uuid),
        column("tenant", Text),
        column("state", Text),
        column("model", Text),
        column("created_at", Stamp),
        column("cancel_requested_at", Stamp),
    )


def are_few(connection: Connection, metadata: Mapping[str, str], tenant: str) -> bool:
    """Whether no more than `MANY` of a tenant's jobs have these labels."""
    some = select(func.count()).select_from(labelled(metadata, tenant))
    return (connection.scalar(some) or 0) <= MANY
