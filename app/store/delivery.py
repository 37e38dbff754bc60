"""Delivery: where the message of a queued job is, as far as the row knows. Nobody else writes it.

                                 ┌────────take─────────────┐
    insert ─▶ unsent ──send──▶ sent ──receive──▶ held ──claim──▶ (running)
                ▲ ▲              │ ▲                │
                │ └──not sent────┘ └────let go──────┤
                └──── worker lost, or it forgot ────┘

A queued job without a message is `unsent`; one whose message is in Redis is `sent`; one whose
message a worker has is `held`. A row is marked *before* its message is sent: whoever dies between
leaves a `sent` job without a message, and those are known: rescue looks into Redis which messages
are there, and sends the others again. Both receiving and taking are allowed from everywhere, for a
message may be late, doubled or forged.

Columns of `open_jobs`: `worker_id` (the holder, who keeps it when it claims), `received_at` (since
when it has it), `enqueued_at` (last sent), `wake_count` (times it was sent again). Statements of
other modules take the fragments below.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, Row, text

from app.jobs import DEFAULT_TENANT, Kind
from app.requests.bodies import FORMAT
from app.store.lookup import OPEN_MODELS, locked


class Delivery(enum.StrEnum):
    UNSENT = "unsent"  #: nobody has its message: rescue sends one when it is due
    SENT = "sent"  #: its message lies in Redis, or is on its way there or from there
    HELD = "held"  #: a worker has received it and not claimed it yet


DELIVERY_TRANSITIONS: Final[dict[Delivery, frozenset[Delivery]]] = {
    Delivery.UNSENT: frozenset({Delivery.SENT, Delivery.HELD}),
    Delivery.SENT: frozenset({Delivery.HELD, Delivery.UNSENT}),
    Delivery.HELD: frozenset({Delivery.SENT, Delivery.UNSENT}),
}
"""What a queued job may do besides staying as it is: sent again, or received by another."""


def delivery_of(received_by: UUID | None, enqueued_at: datetime | None) -> Delivery:
    """Where the message of a queued job with these columns is."""
    if received_by is not None:
        return Delivery.HELD
    return Delivery.UNSENT if enqueued_at is None else Delivery.SENT


UNSENT: Final = "state = 'queued' AND worker_id IS NULL AND enqueued_at IS NULL"
SENT: Final = "state = 'queued' AND worker_id IS NULL AND enqueued_at IS NOT NULL"
WAITING: Final = "state = 'queued' AND worker_id IS NULL"
"""Unsent or sent: the length of the queue."""
HELD: Final = "state = 'queued' AND worker_id IS NOT NULL"


def known(table: str) -> str:
    """SQL: whether a job is of a kind and format that are known here. Others are a later version's,
    whose own workers and rescue look after them."""
    kinds = ", ".join(f"'{kind}'" for kind in Kind)
    return f"{table}.kind IN ({kinds}) AND {table}.format <= {FORMAT}"


KNOWN: Final = known("open_jobs")


# ── fragments for statements of other modules ───────────────────────────────────────────────────

INSERTED: Final = """
    CAST(NULL AS uuid), CAST(NULL AS timestamptz),
    CASE WHEN coalesce(not_before, now()) <= now() AND (CAST(:sent AS bool[]))[ordinality]
        THEN now() END
"""
"""Values of (worker_id, received_at, enqueued_at) for a new row: `sent` if it is due and, as is
told of each row at its place, about to be."""

BROUGHT: Final = """
    CASE WHEN coalesce(not_before, now()) <= now() THEN CAST(:worker_id AS uuid) END,
    CASE WHEN coalesce(not_before, now()) <= now() THEN now() END,
    CASE WHEN coalesce(not_before, now()) <= now() THEN now() END
"""
"""The same for a row that its message brought. One that is not due is nobody's: its message is
acknowledged, and rescue sends one in time."""

RECEIVED: Final = f"""
    worker_id = CASE WHEN open_jobs.state = 'queued' AND open_jobs.not_before <= now() AND {KNOWN}
        THEN CAST(:worker_id AS uuid) ELSE open_jobs.worker_id END,
    received_at = CASE WHEN open_jobs.state = 'queued' AND open_jobs.not_before <= now() AND {KNOWN}
        THEN now() ELSE open_jobs.received_at END,
    enqueued_at = CASE WHEN open_jobs.state <> 'queued' THEN open_jobs.enqueued_at
        WHEN open_jobs.not_before > now() AND open_jobs.worker_id IS NULL THEN NULL
        ELSE coalesce(open_jobs.enqueued_at, now()) END
"""
"""For an open row whose message came to a worker."""

TAKEN: Final = """
    received_at = CASE WHEN open_jobs.worker_id = :worker_id
        THEN coalesce(open_jobs.received_at, now()) ELSE now() END,
    enqueued_at = coalesce(open_jobs.enqueued_at, now())
"""
"""For a row that is claimed as its message comes, if its worker did not hold it already."""

QUEUED_AGAIN: Final = "worker_id = NULL, received_at = NULL, enqueued_at = NULL, wake_count = 0"
"""For a row that comes back into the queue."""


# ── sending ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class WakeUp:
    """A job that was marked as sent: its message is to be sent now."""

    id: UUID
    model: str
    kind: Kind
    priority: int
    tenant: str


def _wake_ups(rows: Sequence[Row[Any]]) -> list[WakeUp]:
    """In the order to send them: by priority, then oldest first."""
    ordered = sorted(rows, key=lambda row: (row.priority, row.not_before, row.id))
    return [WakeUp(row.id, row.model, Kind(row.kind), row.priority, row.tenant) for row in ordered]


# The models and tenants of unsent jobs, by steps from each to the next in the index.
_UNSENT: Final = text(f"""
    WITH RECURSIVE found (model, tenant) AS (
        (SELECT model, tenant FROM open_jobs WHERE {UNSENT} ORDER BY model, tenant LIMIT 1)
        UNION ALL
        SELECT next.* FROM found CROSS JOIN LATERAL (
            SELECT open_jobs.model, open_jobs.tenant FROM open_jobs
            WHERE {UNSENT}
                AND (open_jobs.model, open_jobs.tenant) > (found.model, found.tenant)
            ORDER BY open_jobs.model, open_jobs.tenant LIMIT 1
        ) AS next
    )
    SELECT model, tenant FROM found
""")


def unsent(connection: Connection) -> list[tuple[str, str]]:
    """The models of all unsent jobs, due or not, each with each tenant that has some."""
    return [(row.model, row.tenant) for row in connection.execute(_UNSENT)]


# Mark unsent jobs of a model and tenant that are due: by priority, then oldest first.
_SEND_DUE: Final = text(f"""
    WITH due AS MATERIALIZED (
        SELECT job.id FROM unnest(CAST(:priorities AS int[])) AS given(priority)
        CROSS JOIN LATERAL (
            SELECT id FROM open_jobs
            WHERE {UNSENT} AND model = :model AND tenant = :tenant AND priority = given.priority
                AND not_before <= now() AND {KNOWN}
            ORDER BY not_before LIMIT :page
            FOR NO KEY UPDATE SKIP LOCKED
        ) AS job
        LIMIT :page
    )
    UPDATE open_jobs SET enqueued_at = now() FROM due WHERE open_jobs.id = due.id
    RETURNING open_jobs.id, model, kind, priority, not_before, tenant
""")


def send_due(
    connection: Connection,
    model: str,
    priorities: Sequence[int],
    page: int,
    *,
    tenant: str = DEFAULT_TENANT,
) -> list[WakeUp]:
    """Mark due jobs of the first of these priorities that have unsent ones. Commit, then send."""
    given = {"model": model, "priorities": list(priorities), "page": page, "tenant": tenant}
    return _wake_ups(connection.execute(_SEND_DUE, given).all())


_IS_OVERDUE: Final = """
    enqueued_at < now() - :lost_after_s * interval '1 s'
    AND enqueued_at < now() - :lost_after_s * 2 ^ least(wake_count, 16) * interval '1 s'
"""

# Sent jobs whose message may be lost by now: model by model in the index, oldest first.
_OVERDUE: Final = text(f"""
    {OPEN_MODELS}
    SELECT job.id, job.model FROM found CROSS JOIN LATERAL (
        SELECT id, model FROM open_jobs
        WHERE {SENT} AND model = found.model AND {KNOWN} AND not_before <= now() AND {_IS_OVERDUE}
        ORDER BY enqueued_at LIMIT :most
    ) AS job
""")


def overdue(connection: Connection, lost_after_s: float, most: int) -> dict[UUID, str]:
    """Jobs, with their models, that nobody has received for `lost_after_s` × 2^wake_count.

    At most `most` of each model. That is normal in a long queue: whether a message is lost, Redis
    knows.
    """
    rows = connection.execute(_OVERDUE, {"lost_after_s": lost_after_s, "most": most})
    return {row[0]: row[1] for row in rows}


# Mark jobs whose message is lost, unless another rescue process just did.
_SEND_AGAIN: Final = text(f"""
    WITH lost AS MATERIALIZED (
        SELECT job.id FROM unnest(CAST(:ids AS uuid[])) AS given(id)
        {locked("given.id", skip=True)}
        WHERE {SENT} AND {_IS_OVERDUE}
    )
    UPDATE open_jobs SET enqueued_at = now(), wake_count = least(wake_count, 32766) + 1
    FROM lost WHERE open_jobs.id = lost.id
    RETURNING open_jobs.id, model, kind, priority, not_before, tenant
""")


def send_again(connection: Connection, ids: Collection[UUID], lost_after_s: float) -> list[WakeUp]:
    """Mark those of these jobs that are still overdue. Commit, then send."""
    given = {"ids": list(ids), "lost_after_s": lost_after_s}
    return _wake_ups(connection.execute(_SEND_AGAIN, given).all())


# Take back the mark of jobs whose message could not be sent.
_NOT_SENT: Final = text(f"""
    WITH marked AS MATERIALIZED (
        SELECT job.id FROM unnest(CAST(:ids AS uuid[])) AS given(id)
        {locked("given.id", skip=True)}
        WHERE {SENT}
    )
    UPDATE open_jobs SET enqueued_at = NULL FROM marked WHERE open_jobs.id = marked.id
""")


def not_sent(connection: Connection, ids: Collection[UUID]) -> None:
    """The messages of these jobs were not sent after all: they are unsent again.

    One that this does not reach is found like any whose message is lost.
    """
    if ids:
        connection.execute(_NOT_SENT, {"ids": list(ids)})


# ── holding ─────────────────────────────────────────────────────────────────────────────────────

# Let go of held jobs.
_LET_GO: Final = text(f"""
    WITH held AS MATERIALIZED (
        SELECT job.id FROM unnest(CAST(:ids AS uuid[])) AS given(id)
        {locked("given.id")}
        WHERE {HELD} AND worker_id = :worker_id
    )
    UPDATE open_jobs SET
        worker_id = NULL, received_at = NULL,
        enqueued_at = CASE WHEN not_before <= now() THEN now() END
    FROM held WHERE open_jobs.id = held.id
""")


def let_go(connection: Connection, worker_id: UUID, ids: Sequence[UUID]) -> None:
    """Let go of jobs that this worker holds and will not claim.

    The messages of due ones are taken to go back to Redis; one that does not is found like any
    that is lost. Jobs that are not due are unsent: rescue sends them in time.
    """
    if ids:
        connection.execute(_LET_GO, {"worker_id": worker_id, "ids": sorted(ids)})


# Free what a worker holds by its rows and does not know of.
_FREE_FORGOTTEN: Final = text(f"""
    WITH forgotten AS MATERIALIZED (
        SELECT id FROM open_jobs
        WHERE {HELD} AND worker_id = :worker_id
            AND id NOT IN (SELECT unnest(CAST(:known AS uuid[])))
        FOR NO KEY UPDATE SKIP LOCKED
    )
    UPDATE open_jobs SET worker_id = NULL, received_at = NULL, enqueued_at = NULL
    FROM forgotten WHERE open_jobs.id = forgotten.id
    RETURNING open_jobs.id
""")


def free_forgotten(connection: Connection, worker_id: UUID, known: Collection[UUID]) -> list[UUID]:
    """Free the jobs that a living worker holds without knowing; their ids.

    It may have received a message, lost the answer to that statement, and then been told to forget
    what it had. Only the thread that receives may call this: it knows all that the worker has.
    """
    given = {"worker_id": worker_id, "known": list(known)}
    return list(connection.scalars(_FREE_FORGOTTEN, given))


LEASE_OVER: Final = """
    NOT EXISTS (SELECT FROM workers WHERE workers.id = {worker} AND lease_expires_at > now())
"""

# Free what lost workers hold.
_FREE_LOST: Final = text(f"""
    WITH orphan AS MATERIALIZED (
        SELECT id FROM open_jobs WHERE {HELD} AND {LEASE_OVER.format(worker="open_jobs.worker_id")}
        LIMIT :page
        FOR NO KEY UPDATE OF open_jobs SKIP LOCKED
    )
    UPDATE open_jobs SET worker_id = NULL, received_at = NULL, enqueued_at = NULL
    FROM orphan WHERE open_jobs.id = orphan.id
""")


def free_lost(connection: Connection, page: int) -> int:
    """Jobs whose message died with the worker that held it are unsent again; how many."""
    return connection.execute(_FREE_LOST, {"page": page}).rowcount
