"""Webhooks: the outbox, and what its deliverers do with it.

    (an end) ──▶ pending ──claim──▶ pending, under a lease ──record──▶ delivered | failed
                    ▲                       │
                    └──── next attempt ─────┘        (or its deliverer died: the lease runs out)

A delivery is written in the transaction that ends what it tells of, by `announce_ends` in Postgres:
triggers on `results` and on `job_batches` call it, whatever statement ends a job or a batch.
An event's id is that of what ended, which ends once: so it is the same at every attempt and replay,
and no event goes to one receiver as two.

A receiver is a server: scheme, host and port, to a tenant. One that fails again and again rests,
and is then asked by one delivery at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from sqlalchemy import Connection, text

from app.store.encoding import encode
from app.webhooks.schedule import TRIP, WINDOW_S


@dataclass(frozen=True, slots=True)
class Receiver:
    tenant: str
    origin: str  #: scheme, host and port


@dataclass(frozen=True, slots=True)
class Due:
    """A delivery to be made now, under a lease."""

    id: UUID
    lease: UUID
    tenant: str
    origin: str
    event_id: UUID
    type: str
    object_id: str
    url: str
    is_test: bool
    tries: int  #: this one included, since its schedule began
    created_at: datetime
    now: datetime  #: by the database's clock
    age_s: float  #: since its schedule began
    failures: int  #: of its receiver, in a row
    secret: str | None  #: sealed; None: its tenant has none yet
    old_secret: str | None  #: if it signs as well

    @property
    def receiver(self) -> Receiver:
        return Receiver(self.tenant, self.origin)


# Claim what is due: of a receiver so many as it has room for, of one that is tripped a single one.
_CLAIM: Final = text(f"""
    WITH receiver AS MATERIALIZED (
        SELECT tenant, origin, failures, coalesce(busy.number, 0) AS busy
        FROM webhook_receivers LEFT JOIN jsonb_to_recordset(CAST(:busy AS jsonb))
            AS busy(tenant text, origin text, number int) USING (tenant, origin)
        WHERE (retry_at > now()) IS NOT TRUE AND EXISTS (
            SELECT FROM webhook_deliveries AS due
            WHERE due.tenant = webhook_receivers.tenant AND due.origin = webhook_receivers.origin
                AND state = 'pending' AND next_at <= now()
        )
        FOR NO KEY UPDATE OF webhook_receivers SKIP LOCKED
    ), due AS MATERIALIZED (
        SELECT each.id, receiver.tenant, receiver.origin, failures
        FROM receiver CROSS JOIN LATERAL (
            SELECT id FROM webhook_deliveries
            WHERE webhook_deliveries.tenant = receiver.tenant
                AND webhook_deliveries.origin = receiver.origin
                AND state = 'pending' AND next_at <= now()
            ORDER BY next_at
            LIMIT CASE WHEN failures < {TRIP} THEN greatest(0, :each - busy)
                WHEN busy = 0 THEN 1 ELSE 0 END
            FOR NO KEY UPDATE SKIP LOCKED
        ) AS each
        ORDER BY random() LIMIT :room  -- nobody first, however many there are
    ), asked AS (  -- who is tripped is not asked by others meanwhile
        UPDATE webhook_receivers SET retry_at = now() + :lease_s * interval '1 s'
        FROM due WHERE webhook_receivers.tenant = due.tenant
            AND webhook_receivers.origin = due.origin AND webhook_receivers.failures >= {TRIP}
    ), leased AS (
        UPDATE webhook_deliveries SET
            attempts = attempts + 1, lease = gen_random_uuid(),
            next_at = now() + :lease_s * interval '1 s'
        FROM due WHERE webhook_deliveries.id = due.id
        RETURNING webhook_deliveries.*, failures
    )
    SELECT
        leased.id, lease, leased.tenant, origin, event_id, type, object_id, leased.url, is_test,
        attempts - attempts_before AS tries, leased.created_at, now() AS now,
        CAST(extract(epoch FROM now() - since) AS double precision) AS age_s, failures,
        secret, CASE WHEN old_secret_until > now() THEN old_secret END AS old_secret
    FROM leased LEFT JOIN webhook_endpoints ON webhook_endpoints.id = endpoint_id
        OR endpoint_id IS NULL AND webhook_endpoints.url IS NULL
            AND webhook_endpoints.tenant = leased.tenant
""")


def claim(
    connection: Connection,
    *,
    room: int,
    each: int,
    lease_s: float,
    busy: Mapping[Receiver, int] | None = None,
) -> list[Due]:
    """Take up to `room` deliveries that are due, for `lease_s`: whoever has not recorded one by
    then has lost it, and it is due again.

    Of one receiver up to `each`, less those that are `busy` with this caller.
    """
    taken = [_Busy(who.tenant, who.origin, number) for who, number in (busy or {}).items()]
    given = {"room": room, "each": each, "lease_s": lease_s, "busy": encode(taken)}
    return [Due(*row) for row in connection.execute(_CLAIM, given)]


@dataclass(frozen=True, slots=True)
class _Busy:
    tenant: str
    origin: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """How an attempt ended."""

    id: UUID  #: of the delivery
    lease: UUID
    took_ms: float
    status_code: int | None = None
    error: str | None = None  #: None: delivered
    wait_s: float | None = None  #: until the next attempt; None: there is none
    pause_s: float | None = None  #: for which its receiver rests
    is_well: bool = True  #: whether the receiver is
    is_gone: bool = False  #: the receiver wants no more


# Record how an attempt ended, unless its lease was lost.
_RECORD: Final = text("""
    WITH given AS MATERIALIZED (
        SELECT * FROM jsonb_to_recordset(CAST(:tried AS jsonb)) AS given(
            id uuid, lease uuid, took_ms double precision, status_code int, error text,
            wait_s double precision, pause_s double precision, is_well bool, is_gone bool)
    ), held AS MATERIALIZED (
        SELECT given.*, tenant, origin, endpoint_id, attempts
        FROM given JOIN webhook_deliveries USING (id)
        WHERE webhook_deliveries.lease = given.lease
        FOR NO KEY UPDATE OF webhook_deliveries
    ), noted AS (
        INSERT INTO webhook_attempts (
            delivery_id, number, tenant, started_at, took_ms, status_code, error
        )
        SELECT id, attempts, tenant, now() - took_ms * interval '1 ms', took_ms, status_code, error
        FROM held
        ON CONFLICT DO NOTHING
    ), told AS (
        UPDATE webhook_receivers SET
            failures = CASE WHEN is_well THEN 0 ELSE failures + 1 END,
            retry_at = CASE WHEN NOT is_well
                THEN greatest(retry_at, now() + pause_s * interval '1 s') END
        FROM held
        WHERE webhook_receivers.tenant = held.tenant AND webhook_receivers.origin = held.origin
            AND (NOT is_well OR failures > 0 OR retry_at IS NOT NULL)
    ), disabled AS (
        UPDATE webhook_endpoints SET disabled_at = now()
        FROM held WHERE is_gone AND webhook_endpoints.id = endpoint_id
            AND webhook_endpoints.disabled_at IS NULL
    )
    UPDATE webhook_deliveries SET
        state = CASE WHEN held.error IS NULL THEN 'delivered'
            WHEN wait_s IS NULL THEN 'failed' ELSE 'pending' END,
        next_at = now() + wait_s * interval '1 s',
        ended_at = CASE WHEN held.error IS NULL OR wait_s IS NULL THEN now() END,
        lease = NULL, error = held.error, status_code = held.status_code
    FROM held WHERE webhook_deliveries.id = held.id
    RETURNING webhook_deliveries.id
""")

# End what is still to go to endpoints that want no more.
_DROP_OF_DISABLED: Final = text("""
    UPDATE webhook_deliveries SET
        state = 'failed', error = 'endpoint_disabled', ended_at = now(), next_at = NULL,
        lease = NULL
    FROM webhook_endpoints
    WHERE webhook_endpoints.id = endpoint_id AND disabled_at IS NOT NULL AND state = 'pending'
""")


def record(connection: Connection, tried: Tried) -> bool:
    """Record how an attempt ended; False if its lease was lost: then somebody else has it."""
    found = connection.execute(_RECORD, {"tried": encode([tried])}).all()
    if tried.is_gone:
        connection.execute(_DROP_OF_DISABLED)
    return bool(found)


# Give up what is pending for so long that no attempt is left: its receiver rested until now.
_GIVE_UP: Final = text("""
    UPDATE webhook_deliveries SET
        state = 'failed', error = coalesce(webhook_deliveries.error, 'receiver_away'),
        ended_at = now(), next_at = NULL, lease = NULL
    FROM webhook_receivers
    WHERE webhook_receivers.tenant = webhook_deliveries.tenant
        AND webhook_receivers.origin = webhook_deliveries.origin
        AND retry_at IS NOT NULL AND state = 'pending'
        AND since < now() - :window_s * interval '1 s'
""")


def give_up(connection: Connection) -> int:
    """Give up deliveries to receivers that rest, once their time is over; how many."""
    return connection.execute(_GIVE_UP, {"window_s": WINDOW_S}).rowcount


# Forget receivers that are well and that nothing is to go to.
_FORGET: Final = text("""
    DELETE FROM webhook_receivers WHERE failures = 0 AND retry_at IS NULL AND NOT EXISTS (
        SELECT FROM webhook_deliveries AS due
        WHERE due.tenant = webhook_receivers.tenant AND due.origin = webhook_receivers.origin
            AND state = 'pending'
    )
""")

# Know the receivers of all that is pending: one may have been forgotten just as it was written.
_REMEMBER: Final = text("""
    INSERT INTO webhook_receivers (tenant, origin)
    SELECT DISTINCT tenant, origin FROM webhook_deliveries AS due
    WHERE state = 'pending' AND NOT EXISTS (
        SELECT FROM webhook_receivers AS known
        WHERE known.tenant = due.tenant AND known.origin = due.origin
    )
    ORDER BY tenant, origin
    ON CONFLICT DO NOTHING
""")


def tidy(connection: Connection) -> None:
    """Keep the table of receivers as small as what is pending."""
    connection.execute(_FORGET)
    connection.execute(_REMEMBER)


# Delete deliveries that ended long ago; their attempts go with them.
_DELETE: Final = text("""
    WITH due AS MATERIALIZED (
        SELECT id FROM webhook_deliveries
        WHERE state <> 'pending' AND ended_at < now() - :keep_s * interval '1 s'
        ORDER BY ended_at LIMIT :page
        FOR UPDATE SKIP LOCKED
    )
    DELETE FROM webhook_deliveries USING due WHERE webhook_deliveries.id = due.id
""")


def delete_deliveries(connection: Connection, keep_s: float, page: int) -> int:
    """Delete deliveries that ended `keep_s` ago, of all tenants; how many."""
    return connection.execute(_DELETE, {"keep_s": keep_s, "page": page}).rowcount
