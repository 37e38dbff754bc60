"""Deliveries as their tenants see them: listed, looked at, made again, and tests."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from sqlalchemy import Connection, text

from app.errors import WebhookConflict, WebhookNotFound
from app.jobs import new_id
from app.store import webhook_endpoints
from app.store.tables import DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class Attempt:
    number: int
    started_at: datetime
    took_ms: float
    status_code: int | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Delivery:
    id: UUID
    event_id: UUID
    endpoint_id: UUID | None  #: None: a webhook_url
    type: str
    object_id: str
    url: str
    state: str
    is_test: bool
    attempts: int
    created_at: datetime
    next_at: datetime | None
    ended_at: datetime | None
    status_code: int | None  #: of the last answer
    error: str | None
    tenant: str


_COLUMNS: Final = (
    "id, event_id, endpoint_id, type, object_id, url, state, is_test, attempts, created_at,"
    " next_at, ended_at, status_code, error, tenant"
)

_FIND: Final = text(f"""
    SELECT {_COLUMNS} FROM webhook_deliveries
    WHERE id = :id AND (CAST(:tenant AS text) IS NULL OR tenant = :tenant)
""")

_ATTEMPTS: Final = text("""
    SELECT number, started_at, took_ms, status_code, error FROM webhook_attempts
    WHERE delivery_id = :id ORDER BY number
""")

# A page of deliveries, newest first.
_LIST: Final = text(f"""
    SELECT {_COLUMNS} FROM webhook_deliveries
    WHERE (CAST(:tenant AS text) IS NULL OR tenant = :tenant)
        AND (CAST(:state AS text) IS NULL OR state = :state)
        AND (CAST(:endpoint_id AS uuid) IS NULL OR endpoint_id = :endpoint_id)
        AND (CAST(:object_id AS text) IS NULL OR object_id = :object_id)
        AND (CAST(:after AS uuid) IS NULL OR (created_at, id) < (
            SELECT created_at, id FROM webhook_deliveries WHERE id = :after
        ))
    ORDER BY created_at DESC, id DESC LIMIT :limit
""")

# Begin the schedule of a delivery anew, at its endpoint's URL of now.
_REPLAY: Final = text(f"""
    UPDATE webhook_deliveries SET
        state = 'pending', since = now(), next_at = now(), attempts_before = attempts,
        ended_at = NULL, lease = NULL, error = NULL, status_code = NULL,
        url = coalesce(endpoint.url, webhook_deliveries.url),
        origin = substring(coalesce(endpoint.url, webhook_deliveries.url) FROM '^https?://[^/]+')
    FROM (SELECT) AS one LEFT JOIN webhook_endpoints AS endpoint ON endpoint.id = :endpoint_id
    WHERE webhook_deliveries.id = :id
    RETURNING {", ".join(f"webhook_deliveries.{name}" for name in _COLUMNS.split(", "))}
""")

# Ask a receiver again though it rests: somebody wants to know.
_WAKE: Final = text("""
    INSERT INTO webhook_receivers (tenant, origin)
    SELECT tenant, origin FROM webhook_deliveries WHERE id = :id
    ON CONFLICT (tenant, origin) DO UPDATE SET retry_at = NULL
        WHERE webhook_receivers.retry_at IS NOT NULL
""")

# Write a test. It comes before all that is due.
_TEST: Final = text(f"""
    INSERT INTO webhook_deliveries (
        id, tenant, event_id, endpoint_id, type, object_id, url, origin, state, is_test,
        created_at, since, next_at
    )
    SELECT :id, tenant, :event_id, id, :type, :object_id, url,
        substring(url FROM '^https?://[^/]+'), 'pending', true, now(), now(), to_timestamp(0)
    FROM webhook_endpoints WHERE id = :endpoint_id
    RETURNING {_COLUMNS}
""")


def find(
    connection: Connection, id: UUID | None, *, tenant: str | None = DEFAULT_TENANT
) -> tuple[Delivery, list[Attempt]]:
    """A delivery and its attempts, the first one first; of any tenant for None.

    Raises `WebhookNotFound`.
    """
    row = connection.execute(_FIND, {"id": id, "tenant": tenant}).one_or_none()
    if row is None:
        raise WebhookNotFound("No such delivery of a webhook.")
    return Delivery(*row), [Attempt(*each) for each in connection.execute(_ATTEMPTS, {"id": id})]


def listed(
    connection: Connection,
    *,
    state: str | None = None,
    endpoint_id: UUID | None = None,
    object_id: str | None = None,
    after: UUID | None = None,
    limit: int,
    tenant: str | None = DEFAULT_TENANT,
) -> list[Delivery]:
    """Those that fit, newest first, beginning behind the delivery `after`; of all tenants for
    None. Raises `WebhookNotFound` for `after`."""
    if after is not None:
        find(connection, after, tenant=tenant)
    given = {"tenant": tenant, "state": state, "endpoint_id": endpoint_id, "object_id": object_id}
    rows = connection.execute(_LIST, given | {"after": after, "limit": limit})
    return [Delivery(*row) for row in rows]


def replay(
    connection: Connection, id: UUID | None, *, tenant: str | None = DEFAULT_TENANT
) -> Delivery:
    """Deliver it, again if it was, at once and with the whole schedule; its event keeps its id.

    Raises `WebhookNotFound`, and `WebhookConflict` if its endpoint is deleted or disabled.
    """
    old, _ = find(connection, id, tenant=tenant)
    if old.endpoint_id is not None:
        try:
            endpoint = webhook_endpoints.find(connection, old.endpoint_id, tenant=old.tenant)
        except WebhookNotFound:
            raise WebhookConflict("The endpoint of this delivery is deleted.") from None
        if endpoint.disabled_at is not None:
            raise WebhookConflict(
                "The endpoint of this delivery answered 410 and is disabled: update it first."
            )
    row = connection.execute(_REPLAY, {"id": id, "endpoint_id": old.endpoint_id}).one()
    connection.execute(_WAKE, {"id": id})
    return Delivery(*row)


def begin_test(
    connection: Connection,
    endpoint_id: UUID | None,
    event_type: str,
    *,
    tenant: str = DEFAULT_TENANT,
) -> Delivery:
    """Have an endpoint sent an event of nothing, once. Raises `WebhookNotFound`."""
    endpoint = webhook_endpoints.find(connection, endpoint_id, tenant=tenant)
    id, event_id = new_id(), new_id()
    object_id = f"{event_type.partition('.')[0]}_test"
    given = {"id": id, "event_id": event_id, "type": event_type, "object_id": object_id}
    row = connection.execute(_TEST, given | {"endpoint_id": endpoint.id}).one()
    connection.execute(_WAKE, {"id": id})
    return Delivery(*row)
