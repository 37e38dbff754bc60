"""The log of what was done about keys, tenants and content. Rows are only added: a trigger refuses
the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import Connection, text

from app.store.tables import DEFAULT_TENANT

# Add an entry.
_NOTE: Final = text("""
    INSERT INTO admin_log (tenant, actor, action, subject, details)
    VALUES (:tenant, :actor, :action, :subject, CAST(:details AS jsonb))
""")

# The last entries, newest first.
_LAST: Final = text("""
    SELECT at, actor, action, tenant, subject, details FROM admin_log
    WHERE CAST(:tenant AS text) IS NULL OR tenant = :tenant
    ORDER BY id DESC LIMIT :limit
""")


@dataclass(frozen=True, slots=True)
class Entry:
    at: datetime
    actor: str
    action: str
    tenant: str
    subject: str
    details: Mapping[str, object]


def note(
    connection: Connection,
    actor: str,
    action: str,
    subject: str,
    *,
    tenant: str = DEFAULT_TENANT,
    details: Mapping[str, object] | None = None,
) -> None:
    """Note that `actor` did `action` to `subject`, in the transaction in which it is done."""
    given = {"tenant": tenant, "actor": actor, "action": action, "subject": subject}
    connection.execute(_NOTE, given | {"details": json.dumps(dict(details or {}))})


def last(connection: Connection, limit: int, *, tenant: str | None = None) -> list[Entry]:
    """The last entries, about one tenant or about all, newest first."""
    return [Entry(*row) for row in connection.execute(_LAST, {"limit": limit, "tenant": tenant})]
