"""Comparisons of models that were made, for those that are made later."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, text

from app.store.encoding import encode


@dataclass(frozen=True, slots=True, kw_only=True)
class NewComparison:
    """A comparison that was made. Field names are columns of `comparisons`."""

    id: UUID
    machine: str
    kind: str
    prompts_digest: str
    num_prompts: int
    a: str
    b: str
    a_digest: str
    b_digest: str
    figures: dict[str, Any]


@dataclass(frozen=True, slots=True)
class StoredComparison:
    made_at: datetime
    machine: str
    kind: str
    num_prompts: int
    a: str
    b: str
    figures: dict[str, Any]


_ADD: Final = text("""
    INSERT INTO comparisons (
        id, made_at, machine, kind, prompts_digest, num_prompts, a, b, a_digest, b_digest, figures
    )
    SELECT
        id, now(), machine, kind, prompts_digest, num_prompts, a, b, a_digest, b_digest, figures
    FROM jsonb_populate_recordset(NULL::comparisons, CAST(:comparisons AS jsonb))
    ON CONFLICT (id) DO NOTHING
""")


def add_comparison(connection: Connection, comparison: NewComparison) -> None:
    """Keep it. May be repeated."""
    connection.execute(_ADD, {"comparisons": encode([comparison])})


_COLUMNS: Final = "made_at, machine, kind, num_prompts, a, b, figures"

# The same two over the same prompts on the same machine, newest first.
_LIKE: Final = text(f"""
    SELECT {_COLUMNS} FROM comparisons
    WHERE a_digest = :a_digest AND b_digest = :b_digest
        AND prompts_digest = :prompts_digest AND machine = :machine AND id <> :id
    ORDER BY made_at DESC LIMIT :most
""")


def earlier_ones(
    connection: Connection, comparison: NewComparison, most: int
) -> list[StoredComparison]:
    """Earlier ones that this one can be held against: only time, and the code, lie between."""
    given = {
        name: getattr(comparison, name)
        for name in ("id", "a_digest", "b_digest", "prompts_digest", "machine")
    }
    return [StoredComparison(*row) for row in connection.execute(_LIKE, given | {"most": most})]


# All, newest first.
_ALL: Final = text(f"""
    SELECT {_COLUMNS} FROM comparisons
    WHERE (CAST(:a AS text) IS NULL OR a = :a) AND (CAST(:b AS text) IS NULL OR b = :b)
    ORDER BY made_at DESC LIMIT :most
""")


def list_comparisons(
    connection: Connection, a: str | None, b: str | None, most: int
) -> list[StoredComparison]:
    """Those of models that were named so; of all where None is given."""
    rows = connection.execute(_ALL, {"a": a, "b": b, "most": most})
    return [StoredComparison(*row) for row in rows]
