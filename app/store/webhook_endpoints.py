"""Endpoints: who receives a tenant's events, and the secrets that sign for them.

Secrets come and go sealed, as `app.webhooks.vault` makes them. One endpoint of a tenant has no URL:
its secret signs for the URLs that jobs and batches bring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from sqlalchemy import Connection, text

from app.errors import WebhookConflict, WebhookNotFound
from app.jobs import new_id
from app.store.tables import DEFAULT_TENANT
from app.webhooks.vault import Secret

MAX_ENDPOINTS: Final = 100
"""Of a tenant: each that asks for an event is a delivery of it."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    id: UUID
    name: str
    url: str
    event_types: list[str]
    secret_hint: str
    created_at: datetime
    updated_at: datetime
    disabled_at: datetime | None


_COLUMNS: Final = "id, name, url, event_types, secret_hint, created_at, updated_at, disabled_at"
_IT: Final = "id = :id AND tenant = :tenant AND url IS NOT NULL"

# Make an endpoint, unless there are too many.
_CREATE: Final = text(f"""
    INSERT INTO webhook_endpoints (
        id, tenant, name, url, event_types, secret, secret_hint, created_at, updated_at
    )
    SELECT :id, :tenant, :name, :url, :event_types, :secret, :hint, now(), now()
    WHERE :most > (
        SELECT count(*) FROM webhook_endpoints WHERE tenant = :tenant AND url IS NOT NULL
    )
    RETURNING {_COLUMNS}
""")

_FIND: Final = text(f"SELECT {_COLUMNS} FROM webhook_endpoints WHERE {_IT}")

# A page of endpoints, newest first.
_LIST: Final = text(f"""
    SELECT {_COLUMNS} FROM webhook_endpoints
    WHERE tenant = :tenant AND url IS NOT NULL AND (
        CAST(:after AS uuid) IS NULL OR (created_at, id) < (
            SELECT created_at, id FROM webhook_endpoints WHERE id = :after AND tenant = :tenant
        )
    )
    ORDER BY created_at DESC, id DESC LIMIT :limit
""")

# Change an endpoint. Whoever does so has it receive again.
_UPDATE: Final = text(f"""
    UPDATE webhook_endpoints SET
        name = coalesce(:name, name), url = coalesce(:url, url),
        event_types = coalesce(CAST(:event_types AS text[]), event_types),
        updated_at = CASE
            WHEN disabled_at IS NULL AND (name, url, event_types) IS NOT DISTINCT FROM (
                coalesce(:name, name), coalesce(:url, url),
                coalesce(CAST(:event_types AS text[]), event_types)
            ) THEN updated_at ELSE now() END,
        disabled_at = NULL
    WHERE {_IT}
    RETURNING {_COLUMNS}
""")

# Let what is still to go to an endpoint go where it is now.
_MOVE: Final = text("""
    WITH placed AS (
        SELECT tenant, url, substring(url FROM '^https?://[^/]+') AS origin
        FROM webhook_endpoints WHERE id = :id
    ), received AS (
        INSERT INTO webhook_receivers (tenant, origin) SELECT tenant, origin FROM placed
        ON CONFLICT DO NOTHING
    )
    UPDATE webhook_deliveries SET url = placed.url, origin = placed.origin
    FROM placed WHERE endpoint_id = :id AND state = 'pending'
        AND webhook_deliveries.url <> placed.url
""")

_DELETE: Final = text(f"DELETE FROM webhook_endpoints WHERE {_IT}")

# End what was still to go to an endpoint that is deleted.
_DROP: Final = text("""
    UPDATE webhook_deliveries SET
        state = 'failed', error = 'endpoint_deleted', ended_at = now(), next_at = NULL,
        lease = NULL
    WHERE endpoint_id = :id AND state = 'pending'
""")

_ROTATED: Final = """
    old_secret = CASE WHEN :keep_s > 0 THEN webhook_endpoints.secret END,
    old_secret_until = CASE WHEN :keep_s > 0 THEN now() + :keep_s * interval '1 s' END,
    updated_at = now()
"""

# Have another secret sign; the one before may do so as well for a while.
_ROTATE: Final = text(f"""
    UPDATE webhook_endpoints SET secret = :secret, secret_hint = :hint, {_ROTATED}
    WHERE {_IT}
    RETURNING {_COLUMNS}
""")

_OWN: Final = """
    INSERT INTO webhook_endpoints (
        id, tenant, name, event_types, secret, secret_hint, created_at, updated_at
    )
    VALUES (:id, :tenant, 'webhook_url', '{}', :secret, :hint, now(), now())
    ON CONFLICT (tenant) WHERE url IS NULL
"""

# The same for the URLs that jobs bring.
_ROTATE_OWN: Final = text(f"""
    {_OWN} DO UPDATE SET secret = excluded.secret, secret_hint = excluded.secret_hint, {_ROTATED}
    RETURNING updated_at
""")

# Keep the secret that signs for the URLs that jobs bring, unless there is one.
_KEEP_OWN: Final = text(f"{_OWN} DO NOTHING")

_OWN_SECRET: Final = text(
    "SELECT secret FROM webhook_endpoints WHERE tenant = :tenant AND url IS NULL"
)


def create(
    connection: Connection,
    *,
    name: str,
    url: str,
    event_types: Sequence[str],
    secret: Secret,
    tenant: str = DEFAULT_TENANT,
) -> Endpoint:
    """Make an endpoint. Raises `WebhookConflict` if its tenant has `MAX_ENDPOINTS`."""
    given = {"id": new_id(), "tenant": tenant, "name": name, "url": url, "most": MAX_ENDPOINTS}
    given |= {"event_types": list(event_types), "secret": secret.sealed, "hint": secret.hint}
    row = connection.execute(_CREATE, given).one_or_none()
    if row is None:
        raise WebhookConflict(f"There are {MAX_ENDPOINTS} webhook endpoints: delete one.")
    return Endpoint(*row)


def find(connection: Connection, id: UUID | None, *, tenant: str = DEFAULT_TENANT) -> Endpoint:
    """Raises `WebhookNotFound`, as all do here that are given an id."""
    row = connection.execute(_FIND, {"id": id, "tenant": tenant}).one_or_none()
    if row is None:
        raise WebhookNotFound()
    return Endpoint(*row)


def listed(
    connection: Connection,
    *,
    after: UUID | None = None,
    limit: int,
    tenant: str = DEFAULT_TENANT,
) -> list[Endpoint]:
    """Newest first, beginning behind the endpoint `after`."""
    if after is not None:
        find(connection, after, tenant=tenant)
    rows = connection.execute(_LIST, {"tenant": tenant, "after": after, "limit": limit})
    return [Endpoint(*row) for row in rows]


def update(
    connection: Connection,
    id: UUID | None,
    *,
    name: str | None = None,
    url: str | None = None,
    event_types: Sequence[str] | None = None,
    tenant: str = DEFAULT_TENANT,
) -> Endpoint:
    """Change what is given; one that was disabled receives again. What is pending goes to a new
    URL."""
    types = list(event_types) if event_types is not None else None
    given = {"id": id, "tenant": tenant, "name": name, "url": url, "event_types": types}
    row = connection.execute(_UPDATE, given).one_or_none()
    if row is None:
        raise WebhookNotFound()
    if url is not None:
        connection.execute(_MOVE, {"id": id})
    return Endpoint(*row)


def delete(connection: Connection, id: UUID | None, *, tenant: str = DEFAULT_TENANT) -> None:
    """Delete it, with its secret; what was still to go to it has failed."""
    if not connection.execute(_DELETE, {"id": id, "tenant": tenant}).rowcount:
        raise WebhookNotFound()
    connection.execute(_DROP, {"id": id})


def rotate(
    connection: Connection,
    id: UUID | None,
    secret: Secret,
    keep_s: float = 0.0,
    *,
    tenant: str = DEFAULT_TENANT,
) -> Endpoint:
    """Have this secret sign from now on; the one before signs as well for `keep_s`."""
    given = {"id": id, "tenant": tenant, "secret": secret.sealed, "hint": secret.hint}
    row = connection.execute(_ROTATE, given | {"keep_s": keep_s}).one_or_none()
    if row is None:
        raise WebhookNotFound()
    return Endpoint(*row)


def rotate_own(
    connection: Connection, secret: Secret, keep_s: float = 0.0, *, tenant: str = DEFAULT_TENANT
) -> datetime:
    """The same for the URLs that jobs and batches bring; when that was."""
    given = {"id": new_id(), "tenant": tenant, "secret": secret.sealed, "hint": secret.hint}
    at: datetime = connection.execute(_ROTATE_OWN, given | {"keep_s": keep_s}).scalar_one()
    return at


def own_secret(connection: Connection, secret: Secret, *, tenant: str = DEFAULT_TENANT) -> str:
    """What signs for these, sealed; the given one if there was none."""
    given = {"id": new_id(), "tenant": tenant, "secret": secret.sealed, "hint": secret.hint}
    connection.execute(_KEEP_OWN, given)
    sealed: str = connection.execute(_OWN_SECRET, {"tenant": tenant}).scalar_one()
    return sealed
