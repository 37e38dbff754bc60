"""Worker incarnations and their leases.

An attempt's lease is its worker's lease: one row to renew, however much the worker runs. When the
lease has run out, rescue may take the worker's jobs. Until it does, a late heartbeat renews the
lease and nothing is lost; afterwards the attempts are missing from `Heartbeat.held`, every write
under them is fenced, and the worker goes on with new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, text

from app.errors import LeaseLost
from app.store.encoding import encode


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWorker:
    """A worker process that starts. Field names are columns of `workers`."""

    id: UUID
    name: str
    host: str
    pid: int
    models: Sequence[str]
    device: str
    device_index: int | None = None
    price_id: str | None = None
    currency: str | None = None
    price_per_device_hour: Decimal | None = None
    engine: dict[str, Any] = field(default_factory=dict)


# Register a worker that starts, with its first lease.
_REGISTER: Final = text("""
    INSERT INTO workers (
        id, name, host, pid, models, device, device_index, engine, price_id, currency,
        price_per_device_hour, started_at, heartbeat_at, lease_expires_at
    )
    SELECT
        id, name, host, pid, models, device, device_index, engine, price_id, currency,
        price_per_device_hour, now(), now(), now() + :lease_s * interval '1 s'
    FROM jsonb_populate_recordset(NULL::workers, CAST(:workers AS jsonb))
    ON CONFLICT (id) DO NOTHING
""")


def register_worker(connection: Connection, worker: NewWorker, lease_s: float) -> None:
    """Register this process under its new id. May be repeated."""
    connection.execute(_REGISTER, {"workers": encode([worker]), "lease_s": lease_s})


# Tell what the engines of the workers that are up run on, by model.
_COMPUTES: Final = text("""
    SELECT DISTINCT model, computes
    FROM workers, jsonb_each_text(engine -> 'kernels') AS each(model, computes)
    WHERE stopped_at IS NULL AND lease_expires_at > now()
    ORDER BY model, computes
""")


def what_computes(connection: Connection) -> list[tuple[str, str]]:
    """Pairs of a model and how a worker that is up runs it, in its own words."""
    return [(row.model, row.computes) for row in connection.execute(_COMPUTES)]


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What is true of a worker's attempts at a heartbeat."""

    held: frozenset[UUID]  #: attempts that are still its own
    cancel_requested: frozenset[UUID]  #: those of them that the caller cancelled
    past_deadline: frozenset[UUID]  #: those of them whose deadline has passed


# Renew a worker's lease.
_RENEW: Final = text("""
    UPDATE workers SET heartbeat_at = now(), lease_expires_at = now() + :lease_s * interval '1 s'
    WHERE id = :worker_id AND stopped_at IS NULL
""")

# List a worker's running attempts.
_HELD: Final = text("""
    SELECT attempt_id, cancel_requested_at IS NOT NULL, (deadline <= now()) IS TRUE
    FROM open_jobs WHERE worker_id = :worker_id AND state = 'running'
""")


def heartbeat(connection: Connection, worker_id: UUID, lease_s: float) -> Heartbeat:
    """Renew the lease and tell what of its work a worker still has and should cut short.

    Raises `LeaseLost` if the worker is not registered or was stopped.
    """
    renewed = connection.execute(_RENEW, {"worker_id": worker_id, "lease_s": lease_s})
    if renewed.rowcount == 0:
        raise LeaseLost()
    rows = connection.execute(_HELD, {"worker_id": worker_id}).all()
    return Heartbeat(
        held=frozenset(attempt_id for attempt_id, _, _ in rows),
        cancel_requested=frozenset(attempt_id for attempt_id, cancelled, _ in rows if cancelled),
        past_deadline=frozenset(attempt_id for attempt_id, _, late in rows if late),
    )


# End a worker's lease now.
_STOP: Final = text("""
    UPDATE workers SET stopped_at = now(), lease_expires_at = now()
    WHERE id = :worker_id AND stopped_at IS NULL
""")


def stop_worker(connection: Connection, worker_id: UUID) -> None:
    """Say goodbye: whatever the worker still has is free for rescue at once."""
    connection.execute(_STOP, {"worker_id": worker_id})
