"""Batches as callers see them: made, read, listed, cancelled. Who works on them is in
`app.store.batch_work`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, Row, text

from app.batches import CANCELLABLE, BatchState, Counts, Door
from app.errors import BatchNotFound, BatchStateConflict, Unavailable
from app.store.encoding import encode


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBatch:
    """A batch to be written. Field names are columns of `job_batches`."""

    id: UUID
    tenant: str
    door: Door
    url: str
    input_name: str
    input_file_id: UUID | None
    input_bytes: int
    window_s: float  #: from its acceptance to its expiry
    output_expires_s: float
    fingerprint: str
    metadata: dict[str, str]
    idempotency_key: str | None = None
    webhook_url: str | None = None  #: who is told of its end
    total: int | None = None  #: lines that are known to be right: they are not read through first


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchView:
    """All that may be told of a batch; see `tables.job_batches`."""

    id: UUID
    tenant: str
    door: Door
    url: str
    model: str | None
    input_name: str
    input_file_id: UUID | None
    input_bytes: int
    metadata: dict[str, str]
    idempotency_key: str | None
    fingerprint: str
    created_at: datetime
    expires_at: datetime
    output_expires_s: float
    state: BatchState
    in_progress_at: datetime | None
    cancelling_at: datetime | None
    finalizing_at: datetime | None
    ended_at: datetime | None
    errors: list[dict[str, Any]] | None
    output_file_id: UUID | None
    error_file_id: UUID | None
    counts: Counts
    fed: int
    fed_bytes: int
    fed_rows: int
    input_tokens: int
    cached_tokens: int
    output_tokens: int
    is_over: bool  #: its time is, by the database's clock


COLUMNS: Final = """
    id, tenant, door, url, model, input_name, input_file_id, input_bytes, metadata, idempotency_key,
    fingerprint, created_at, expires_at, output_expires_s, state, in_progress_at, cancelling_at,
    finalizing_at, ended_at, errors, output_file_id, error_file_id, total, fed, fed_bytes, fed_rows,
    succeeded, errored, cancelled, expired, output, error_lines, input_tokens, cached_tokens,
    output_tokens, expires_at <= now() AS is_over
"""
_COUNTS: Final = ("total", "succeeded", "errored", "cancelled", "expired", "output")


def view_of(row: Row[Any]) -> BatchView:
    given = dict(row._mapping)
    counts = Counts(**{name: given.pop(name) for name in _COUNTS}, errors=given.pop("error_lines"))
    given["door"], given["state"] = Door(given["door"]), BatchState(given["state"])
    return BatchView(counts=counts, **given)


# Accept a batch. Stamps are whole seconds, as they are told.
_CREATE: Final = text("""
    INSERT INTO job_batches (
        id, tenant, door, url, input_name, input_file_id, input_bytes, metadata, idempotency_key,
        fingerprint, created_at, expires_at, output_expires_s, webhook_url, state, in_progress_at,
        total
    )
    SELECT
        id, tenant, door, url, input_name, input_file_id, input_bytes, metadata, idempotency_key,
        fingerprint, at, at + CAST(item ->> 'window_s' AS double precision) * interval '1 s',
        output_expires_s, webhook_url,
        CASE WHEN total IS NULL THEN 'validating' ELSE 'in_progress' END,
        CASE WHEN total IS NULL THEN NULL ELSE at END,
        coalesce(total, 0)
    FROM jsonb_array_elements(CAST(:batches AS jsonb)) AS item
    CROSS JOIN jsonb_populate_record(NULL::job_batches, item) AS given
    CROSS JOIN (SELECT date_trunc('second', now()) AS at) AS clock
    ON CONFLICT DO NOTHING
    RETURNING id
""")

_BY_KEY: Final = text(f"""
    SELECT {COLUMNS} FROM job_batches WHERE tenant = :tenant AND idempotency_key = :key
""")

_FIND: Final = text(f"""
    SELECT {COLUMNS} FROM job_batches WHERE id = :id AND tenant = :tenant AND door = :door
""")

_WRITING: Final = text(f"SELECT {COLUMNS} FROM job_batches WHERE id = :id AND tenant = :tenant")

# Ids rise with time: a page begins after one, be it there or not any more.
_LIST: Final = """
    SELECT {columns} FROM job_batches
    WHERE tenant = :tenant AND door = :door {beyond}
    ORDER BY id {order} LIMIT :limit
"""

_LOCK: Final = text("""
    SELECT state FROM job_batches WHERE id = :id AND tenant = :tenant AND door = :door
    FOR NO KEY UPDATE
""")

# Who works on it stops what runs, and cancels what waits.
_CANCEL: Final = text("""
    UPDATE job_batches SET state = 'cancelling', cancelling_at = now() WHERE id = :id
""")

_DELETE_FILES: Final = text("""
    UPDATE files SET state = 'deleted'
    FROM job_batches AS batch
    WHERE batch.id = :id AND files.id IN (batch.output_file_id, batch.error_file_id)
""")
_DELETE: Final = text("DELETE FROM job_batches WHERE id = :id")


def create(connection: Connection, batch: NewBatch) -> tuple[BatchView, bool]:
    """The batch, and whether it is new: with a key that was used before it is the earlier one,
    whatever that asked for (its `fingerprint` tells)."""
    if connection.execute(_CREATE, {"batches": encode([batch])}).one_or_none() is not None:
        return find(connection, batch.id, tenant=batch.tenant, door=batch.door, name=""), True
    given = {"tenant": batch.tenant, "key": batch.idempotency_key}
    row = connection.execute(_BY_KEY, given).one_or_none()
    if row is None:
        raise Unavailable("A batch with the same idempotency key came and went.")
    return view_of(row), False


def find(
    connection: Connection, batch_id: UUID | None, *, tenant: str, door: Door, name: str
) -> BatchView:
    """Raises `BatchNotFound`, which tells `name`."""
    given = {"id": batch_id, "tenant": tenant, "door": door}
    row = connection.execute(_FIND, given).one_or_none()
    if row is None:
        raise BatchNotFound(f"No batch found with id '{name}'.")
    return view_of(row)


def writing(connection: Connection, batch_id: UUID | None, *, tenant: str) -> BatchView | None:
    """The batch that writes a file, or wrote it, as long as it is kept."""
    row = connection.execute(_WRITING, {"id": batch_id, "tenant": tenant}).one_or_none()
    return None if row is None else view_of(row)


def listed(
    connection: Connection,
    *,
    tenant: str,
    door: Door,
    limit: int,
    after: UUID | None = None,
    before: UUID | None = None,
) -> list[BatchView]:
    """Up to so many, newest first: those older than `after`; or the nearest ones that are newer
    than `before`."""
    cursor = after or before
    query = _LIST.format(
        columns=COLUMNS,
        beyond="" if cursor is None else f"AND id {'<' if after else '>'} :cursor",
        order="ASC" if before and not after else "DESC",
    )
    given = {"tenant": tenant, "door": door, "limit": limit}
    asked = given if cursor is None else given | {"cursor": cursor}
    page = [view_of(row) for row in connection.execute(text(query), asked)]
    return page[::-1] if before and not after else page


def cancel(
    connection: Connection, batch_id: UUID | None, *, tenant: str, door: Door, name: str
) -> BatchView:
    """Have the batch cancelled by whoever works on it; what it is then. May be repeated.

    Raises `BatchNotFound`, and `BatchStateConflict` if it has ended otherwise, or is about to.
    """
    given = {"id": batch_id, "tenant": tenant, "door": door}
    state = connection.scalar(_LOCK, given)
    if state in CANCELLABLE:
        connection.execute(_CANCEL, {"id": batch_id})
    elif state is not None and state not in (BatchState.CANCELLING, BatchState.CANCELLED):
        raise BatchStateConflict(f"Cannot cancel a batch with status '{state}'.")
    return find(connection, batch_id, tenant=tenant, door=door, name=name)


def delete(
    connection: Connection, batch_id: UUID | None, *, tenant: str, door: Door, name: str
) -> None:
    """The batch is gone, with its lines and its files; its jobs stay. Raises `BatchNotFound`, and
    `BatchStateConflict` unless it has ended."""
    given = {"id": batch_id, "tenant": tenant, "door": door}
    state = connection.scalar(_LOCK, given)
    if state is None:
        raise BatchNotFound(f"No batch found with id '{name}'.")
    if not BatchState(state).is_final:
        raise BatchStateConflict(f"Cannot delete a batch with status '{state}'. Cancel it first.")
    connection.execute(_DELETE_FILES, {"id": batch_id})
    connection.execute(_DELETE, {"id": batch_id})
