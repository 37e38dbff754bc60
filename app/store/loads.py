"""Loads: how long workers take to load their models, and which do so now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from sqlalchemy import Connection, text

MOST: Final = 100
"""Loads that are looked at: the last."""


@dataclass(frozen=True, slots=True)
class Load:
    """A worker that loads its models, or has; `ended_at` is None until then, or if it failed."""

    models: tuple[str, ...]
    began_at: datetime
    ended_at: datetime | None


# Tell that a worker begins to load, and forget what is long ago.
_BEGIN: Final = text("""
    WITH old AS (DELETE FROM loads WHERE began_at < now() - interval '30 days')
    INSERT INTO loads (worker_id, models, began_at)
    VALUES (:worker_id, :models, clock_timestamp()) ON CONFLICT DO NOTHING
""")

_END: Final = text("""
    UPDATE loads SET ended_at = clock_timestamp() WHERE worker_id = :worker_id AND ended_at IS NULL
""")

_LAST: Final = text("""
    SELECT models, began_at, ended_at FROM loads ORDER BY began_at DESC LIMIT :most
""")


def begin(connection: Connection, worker_id: UUID, models: Sequence[str]) -> None:
    """A worker begins to load these. May be repeated."""
    connection.execute(_BEGIN, {"worker_id": worker_id, "models": list(models)})


def end(connection: Connection, worker_id: UUID) -> None:
    """It has loaded them all. May be repeated."""
    connection.execute(_END, {"worker_id": worker_id})


def last(connection: Connection) -> list[Load]:
    """The loads that began last, newest first."""
    rows = connection.execute(_LAST, {"most": MOST})
    return [Load(tuple(row.models), row.began_at, row.ended_at) for row in rows]
