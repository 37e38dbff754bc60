"""API keys: made, looked up, rotated and revoked. Of a key there is its digest alone.

What is done about them is noted in the same transaction, see `app.store.admin_log`.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, Row, text

from app.errors import KeyNotFound
from app.keys import NewKey, Scope
from app.store import admin_log
from app.store.tables import DEFAULT_TENANT

USED_EVERY_S: Final = 300.0
"""`last_used_at` is no more exact than this: a key that is in use costs a write as rarely."""


@dataclass(frozen=True, slots=True)
class KeyView:
    """A key as it is told of."""

    id: str
    tenant: str
    name: str
    scopes: frozenset[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    is_valid: bool  #: neither revoked nor expired, by the database's clock


@dataclass(frozen=True, slots=True)
class Known:
    """A key as a call with it is judged."""

    tenant: str
    scopes: frozenset[Scope]
    valid_s: float | None  #: for so long from now on; None is for ever, 0 or less is not any more
    is_use_noted: bool  #: its last use was noted lately


_VIEW: Final = """
    id, tenant, name, scopes, created_at, expires_at, revoked_at, last_used_at,
    revoked_at IS NULL AND coalesce(expires_at > now(), true) AS is_valid
"""

_CREATE: Final = text(f"""
    INSERT INTO api_keys (id, tenant, name, scopes, digest, expires_at)
    VALUES (:id, :tenant, :name, :scopes, :digest, :expires_at) RETURNING {_VIEW}
""")
_KNOW_TENANT: Final = text("""
    INSERT INTO tenants (name) VALUES (:tenant) ON CONFLICT DO NOTHING RETURNING name
""")

# What a call with a key needs to know of it.
_FIND: Final = text("""
    SELECT tenant, scopes, digest,
        CASE WHEN revoked_at IS NULL
            THEN CAST(extract(epoch FROM expires_at - now()) AS double precision)
            ELSE 0
        END AS valid_s,
        coalesce(last_used_at > now() - :every_s * interval '1 s', false) AS is_use_noted
    FROM api_keys WHERE id = :id
""")
_NOTE_USE: Final = text("UPDATE api_keys SET last_used_at = now() WHERE id = :id")

_LIST: Final = text(f"""
    SELECT {_VIEW} FROM api_keys
    WHERE CAST(:tenant AS text) IS NULL OR tenant = :tenant ORDER BY tenant, created_at, id
""")
_LOCK: Final = text(f"SELECT {_VIEW} FROM api_keys WHERE id = :id FOR UPDATE")
_REVOKE: Final = text("""
    UPDATE api_keys SET revoked_at = now() WHERE id = :id AND revoked_at IS NULL RETURNING id
""")
_EXPIRE: Final = text(f"""
    UPDATE api_keys SET expires_at = least(expires_at, now() + :overlap_s * interval '1 s')
    WHERE id = :id RETURNING {_VIEW}
""")
_ANY: Final = text("SELECT EXISTS (SELECT FROM api_keys)")
_ANY_VALID: Final = text("""
    SELECT EXISTS (
        SELECT FROM api_keys WHERE revoked_at IS NULL AND coalesce(expires_at > now(), true)
    )
""")


def create(
    connection: Connection,
    key: NewKey,
    *,
    actor: str,
    name: str,
    scopes: Collection[Scope],
    tenant: str = DEFAULT_TENANT,
    expires_at: datetime | None = None,
) -> KeyView:
    """Keep a new key, and its tenant if that is new, too."""
    if connection.execute(_KNOW_TENANT, {"tenant": tenant}).first():
        admin_log.note(connection, actor, "tenant.created", tenant, tenant=tenant)
    made = _insert(connection, key, tenant, name, scopes, expires_at)
    details = {"name": name, "scopes": sorted(scopes), "expires_at": _told(expires_at)}
    admin_log.note(connection, actor, "key.created", key.id, tenant=tenant, details=details)
    return made


def rotate(
    connection: Connection, id: str, key: NewKey, *, actor: str, overlap_s: float
) -> tuple[KeyView, KeyView]:
    """Keep a new key in place of another, which is good for `overlap_s` more at most: the new one
    and the old. Raises `KeyNotFound` unless that is valid."""
    old = _lock(connection, id)
    if not old.is_valid:
        raise KeyNotFound(f"The key {id} is not valid any more: create another one.")
    made = _insert(connection, key, old.tenant, old.name, old.scopes, old.expires_at)
    expiring = _view(connection.execute(_EXPIRE, {"id": id, "overlap_s": overlap_s}).one())
    details = {"by": key.id, "expires_at": _told(expiring.expires_at)}
    admin_log.note(connection, actor, "key.rotated", id, tenant=old.tenant, details=details)
    return made, expiring


def revoke(connection: Connection, id: str, *, actor: str) -> bool:
    """Whether it was not revoked before. Raises `KeyNotFound`."""
    tenant = _lock(connection, id).tenant
    if not connection.execute(_REVOKE, {"id": id}).first():
        return False
    admin_log.note(connection, actor, "key.revoked", id, tenant=tenant)
    return True


def listed(connection: Connection, *, tenant: str | None = None) -> list[KeyView]:
    """One tenant's keys or all, valid or not."""
    return [_view(row) for row in connection.execute(_LIST, {"tenant": tenant})]


def find(connection: Connection, id: str, digest: bytes) -> Known | None:
    """The key of this id, if there ever was one and this is its digest."""
    row = connection.execute(_FIND, {"id": id, "every_s": USED_EVERY_S}).one_or_none()
    if row is None or not hmac.compare_digest(bytes(row.digest), digest):
        return None
    return Known(row.tenant, _scopes(row), row.valid_s, row.is_use_noted)


def note_use(connection: Connection, id: str) -> None:
    connection.execute(_NOTE_USE, {"id": id})


def any_made(connection: Connection) -> bool:
    """Whether there ever was a key: from then on calls need one."""
    return bool(connection.scalar(_ANY))


def any_valid(connection: Connection) -> bool:
    return bool(connection.scalar(_ANY_VALID))


def _insert(
    connection: Connection,
    key: NewKey,
    tenant: str,
    name: str,
    scopes: Collection[Scope],
    expires_at: datetime | None,
) -> KeyView:
    given = {
        "id": key.id,
        "tenant": tenant,
        "name": name,
        "scopes": sorted(scopes),
        "digest": key.digest,
        "expires_at": expires_at,
    }
    return _view(connection.execute(_CREATE, given).one())


def _lock(connection: Connection, id: str) -> KeyView:
    row = connection.execute(_LOCK, {"id": id}).one_or_none()
    if row is None:
        raise KeyNotFound(f"There is no key {id}.")
    return _view(row)


def _view(row: Row[Any]) -> KeyView:
    return KeyView(**{**row._mapping, "scopes": _scopes(row)})


def _scopes(row: Row[Any]) -> frozenset[Scope]:
    """Those that this version knows."""
    return frozenset(Scope(name) for name in row.scopes if name in set(Scope))


def _told(stamp: datetime | None) -> str | None:
    return stamp.isoformat() if stamp else None
