"""What a job was asked, beside what became of it: for doors whose answers give it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, text

from app.store.encoding import UNREADABLE
from app.store.tables import DEFAULT_TENANT

# The request of a job, as long as it is kept.
_ASKED: Final = text("""
    SELECT url, request, format FROM jobs
    WHERE id = :job_id AND tenant = :tenant AND request IS NOT NULL
""")


@dataclass(frozen=True, slots=True)
class Asked:
    url: str | None
    request: dict[str, Any]  #: as it was stored
    format: int


def asked(connection: Connection, job_id: UUID, *, tenant: str = DEFAULT_TENANT) -> Asked | None:
    """None if this tenant has no such job, or its request is not kept any more."""
    row = connection.execute(_ASKED, {"job_id": job_id, "tenant": tenant}).one_or_none()
    if row is None or row.request is UNREADABLE:
        return None
    return Asked(row.url, row.request, row.format)
