"""Reading jobs: status and lists. Changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, TypeVar
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BindParameter,
    Column,
    Connection,
    Row,
    Select,
    Table,
    Uuid,
    any_,
    bindparam,
    select,
    text,
)

from app.errors import JobNotFound, JobUnreadable
from app.jobs import JobState
from app.store import lists
from app.store.encoding import UNREADABLE, state_of
from app.store.lists import ANY, Filter
from app.store.tables import (
    DEFAULT_TENANT,
    Stamp,
    attempts,
    batches,
    job_keys,
    open_jobs,
    results,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

V = TypeVar("V", bound="DataclassInstance")


@dataclass(frozen=True, slots=True)
class AttemptView:
    """One try of the job; see `tables.attempts`."""

    id: UUID
    number: int
    worker_id: UUID
    batch_id: UUID
    claimed_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    outcome: str | None
    charged: bool | None
    device_ns: int | None
    wasted_ns: int | None
    cost: Decimal | None
    energy_nj: int | None
    wasted_nj: int | None
    energy_method: str | None
    error_code: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultView:
    """The answer, its timing and its cost; see `tables.results`."""

    state: JobState
    attempt_id: UUID | None
    batch_id: UUID | None
    batch_size: int | None
    response: dict[str, Any] | None = None  #: left out of lists
    error_code: str | None
    error_message: str | None
    input_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    claimed_at: datetime | None
    started_at: datetime | None
    first_token_at: datetime | None
    finished_at: datetime
    queue_ms: float | None
    batch_wait_ms: float | None
    ttft_ms: float | None
    inference_ms: float | None
    total_ms: float
    device_ns: int
    wasted_ns: int
    prefill_ns: int | None
    recomputed_ns: int | None
    preemptions: int | None
    preempted_ms: float | None
    cost: Decimal | None
    upstream_cost: Decimal | None
    currency: str | None
    price_id: str | None
    price: Decimal | None
    charge: Decimal | None
    energy_nj: int | None
    wasted_nj: int | None
    energy_method: str
    energy_boundary: str | None
    carbon_ug: int | None


@dataclass(frozen=True, slots=True)
class BatchView:
    """The admission batch that the job runs or ran in; see `tables.batches`."""

    id: UUID
    worker_id: UUID
    engine: str
    close_reason: str
    num_jobs: int
    num_sequences: int
    wait_ms: float
    useful_tokens: int
    padded_tokens: int
    device_ns: int
    opened_at: datetime
    claimed_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class JobView:
    """All that may be told of a job except its request; see `tables.jobs`."""

    id: UUID
    tenant: str
    model: str
    kind: str
    url: str | None
    source: str
    replay_of: UUID | None
    state: JobState
    priority: int
    metadata: dict[str, str]
    attempt: int
    attempts_charged: int
    max_attempts: int
    input_tokens: int | None  #: counted at submission; of an ended job, computed
    max_output_tokens: int | None
    not_before: datetime
    deadline: datetime | None
    cancel_requested_at: datetime | None
    purged_at: datetime | None
    created_at: datetime
    queued_at: datetime
    claimed_at: datetime | None
    finished_at: datetime | None
    attempts: tuple[AttemptView, ...]
    result: ResultView | None  #: once the state is final
    batch: BatchView | None  #: while it runs, and of the attempt that ended it
    enqueued_at: datetime | None = None
    received_at: datetime | None = None
    wake_count: int = 0
    worker_id: UUID | None = None  #: who holds or runs it, while it is open


def _columns(view: type[DataclassInstance], table: Table) -> list[Column[Any]]:
    """The columns of a table that a view shows."""
    return [table.c[field.name] for field in fields(view) if field.name in table.c]


_OF_ATTEMPT: Final = _columns(AttemptView, attempts)
_OF_BATCH: Final = _columns(BatchView, batches)
_OF_OPEN: Final = _columns(JobView, open_jobs)
_OF_ENDED: Final = _columns(JobView, results)
_OF_RESULT: Final = _columns(ResultView, results)
_SHOWN: Final = {*_OF_ENDED, *_OF_RESULT} - {results.c.response}

_IDS: Final = any_(bindparam("ids", type_=ARRAY(Uuid)))
_ACCEPTED: Final = any_(bindparam("accepted", type_=ARRAY(Stamp)))
"""When these jobs were accepted: so that their months alone are planned for and looked into."""
_TENANT: Final[BindParameter[str]] = bindparam("tenant")

# What some jobs are known by, and when they were accepted.
_KEYS: Final = select(job_keys.c.id, job_keys.c.created_at, job_keys.c.replay_of).where(
    job_keys.c.id == _IDS, job_keys.c.tenant == _TENANT
)

# The same, and of those that are open their rows, each with the batch that it is in.
_KNOWN: Final = _KEYS.add_columns(*_OF_OPEN, *_OF_BATCH).select_from(
    job_keys.join(open_jobs, open_jobs.c.id == job_keys.c.id, isouter=True).join(
        batches, batches.c.id == open_jobs.c.batch_id, isouter=True
    )
)

# Those that have ended, without their responses, each with the batch that it was in.
_ENDED: Final = (
    select(
        results.c.job_id,
        *(column for column in results.c if column in _SHOWN),
        *_OF_BATCH,
    )
    .join_from(results, batches, batches.c.id == results.c.batch_id, isouter=True)
    .where(results.c.job_id == _IDS, results.c.created_at == _ACCEPTED)
)

# The same with their responses.
_WHOLE: Final = _ENDED.add_columns(results.c.response)

# Their attempts, oldest first.
_TRIED: Final = (
    select(attempts.c.job_id, *_OF_ATTEMPT)
    .where(attempts.c.job_id == _IDS, attempts.c.created_at == _ACCEPTED)
    .order_by(attempts.c.number)
)

# The states of open jobs, and of ended ones.
_OPEN_STATES: Final = select(open_jobs.c.id, open_jobs.c.state).where(
    open_jobs.c.id == _IDS, open_jobs.c.tenant == _TENANT
)
_ENDED_STATES: Final = select(results.c.job_id, results.c.state).where(
    results.c.job_id == _IDS, results.c.created_at == _ACCEPTED
)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A job whose row cannot be read here: nobody who asks for another one suffers for it."""

    id: UUID
    error: JobUnreadable


def find(
    connection: Connection, ids: Sequence[UUID], *, tenant: str = DEFAULT_TENANT
) -> list[JobView | Unreadable]:
    """Jobs with their attempts, batch and result, in the order of `ids`; without those that this
    tenant does not have."""
    return _views(connection, _WHOLE, list(ids), tenant)


def summaries(
    connection: Connection, ids: Sequence[UUID], *, tenant: str = DEFAULT_TENANT
) -> list[JobView | Unreadable]:
    """The same without their responses."""
    return _views(connection, _ENDED, list(ids), tenant)


@dataclass(frozen=True, slots=True)
class Replayable:
    """A job with its request; `replayed_by` is the job that runs it once more, if one does."""

    state: JobState
    url: str | None
    request: dict[str, Any] | None  #: None once it was removed, or if it never was readable
    priority: int
    deadline: datetime | None
    metadata: dict[str, str]
    webhook_url: str | None
    stream_events: bool
    replayed_by: UUID | None


# A job to be replayed, and the job that replays it already.
_REPLAYABLE: Final = text("""
    SELECT state, url, request, priority, deadline, metadata, webhook_url, stream_events,
        (SELECT later.id FROM job_keys AS later WHERE later.replay_of = jobs.id) AS replayed_by
    FROM jobs WHERE id = :job_id AND tenant = :tenant
""")


def replayable(connection: Connection, job_id: UUID, *, tenant: str = DEFAULT_TENANT) -> Replayable:
    """The job with its request. Raises `JobNotFound`."""
    row = connection.execute(_REPLAYABLE, {"job_id": job_id, "tenant": tenant}).one_or_none()
    if row is None:
        raise JobNotFound()
    return Replayable(**{**row._mapping, "state": JobState(row.state)})


def states(
    connection: Connection, ids: Collection[UUID], *, tenant: str = DEFAULT_TENANT
) -> dict[UUID, JobState | JobUnreadable]:
    """The states of those of the jobs that this tenant has."""
    found = open_states(connection, ids, tenant=tenant)
    if rest := [id for id in ids if id not in found]:
        keys = connection.execute(_KEYS, {"ids": rest, "tenant": tenant}).all()
        ended = connection.execute(_ENDED_STATES, _places(keys))
        found |= {id: state_of(state) for id, state in ended}
    return found


def open_states(
    connection: Connection, ids: Collection[UUID], *, tenant: str = DEFAULT_TENANT
) -> dict[UUID, JobState | JobUnreadable]:
    """The same of those that are open."""
    rows = connection.execute(_OPEN_STATES, {"ids": list(ids), "tenant": tenant})
    return {id: state_of(state) for id, state in rows}


def list_jobs(
    connection: Connection,
    given: Filter = ANY,
    *,
    after: UUID | None = None,
    limit: int = 50,
    tenant: str = DEFAULT_TENANT,
) -> list[JobView | Unreadable]:
    """A tenant's jobs that pass the filter, without their responses, newest first, beginning after
    the job `after`. Raises `JobNotFound` if there is no such one."""
    ids = lists.newest(connection, given, after=after, limit=limit, tenant=tenant)
    return summaries(connection, ids, tenant=tenant)


def _views(
    connection: Connection, query: Select[*tuple[Any, ...]], ids: list[UUID], tenant: str
) -> list[JobView | Unreadable]:
    """The jobs in the order of `ids`, as far as this tenant has them."""
    known = connection.execute(_KNOWN, {"ids": ids, "tenant": tenant}).all()
    # Open jobs before ended ones, and both before attempts: what has moved meanwhile is found where
    # it has come to, and a final job's attempts are then final too.
    given = _places(known)
    keys = {row._mapping[job_keys.c.id]: row for row in known}
    rows = {id: row for id, row in keys.items() if row._mapping[open_jobs.c.id] is not None}
    open_ids = set(rows)
    if rest := [key for id, key in keys.items() if id not in rows]:
        for row in connection.execute(query, _places(rest)):
            rows[row._mapping[results.c.job_id]] = row
    tried: dict[UUID, list[Row[Any]]] = {id: [] for id in ids}
    for attempt in connection.execute(_TRIED, given):
        tried[attempt.job_id].append(attempt)
    views: dict[UUID, JobView | Unreadable] = {}
    for id, row in rows.items():
        try:
            views[id] = _job(keys[id], row, tried[id], is_open=id in open_ids)
        except (TypeError, ValueError) as error:
            views[id] = Unreadable(id, JobUnreadable(f"The job's row cannot be read: {error}."))
    return [views[id] for id in ids if id in views]


def _places(keys: Iterable[Row[*tuple[Any, ...]]]) -> dict[str, Any]:
    """Where the rows of these jobs are."""
    ids = {key._mapping[job_keys.c.id]: key._mapping[job_keys.c.created_at] for key in keys}
    return {"ids": list(ids), "accepted": list(set(ids.values()))}


def _job(
    key: Row[*tuple[Any, ...]],
    row: Row[*tuple[Any, ...]],
    tried: Sequence[Row[Any]],
    *,
    is_open: bool,
) -> JobView:
    """Raises `ValueError` for a word that is not known here, or JSON that cannot be held."""
    known = {"finished_at": None} if is_open else {"id": key._mapping[job_keys.c.id]}
    return _view(
        row,
        JobView,
        _OF_OPEN if is_open else _OF_ENDED,
        **known,
        replay_of=key._mapping[job_keys.c.replay_of],
        attempts=tuple(_view(attempt, AttemptView, _OF_ATTEMPT) for attempt in tried),
        result=None if is_open else _view(row, ResultView, _OF_RESULT),
        batch=_view(row, BatchView, _OF_BATCH) if row._mapping[batches.c.id] else None,
    )


def _view(
    row: Row[*tuple[Any, ...]], view: type[V], columns: Sequence[Column[Any]], **more: object
) -> V:
    told = row._mapping
    values = {column.name: told[column] for column in columns if column in told}
    for name, value in values.items():
        if value is UNREADABLE:
            raise ValueError(f"{name} is too large or nested too deep")
    if "state" in values:
        values["state"] = JobState(values["state"])
    return view(**values, **more)
