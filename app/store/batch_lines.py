"""Lines of batches as they are told: each with its outcome and its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, text

from app.batches import LineFile, LineOutcome

# The lines of a file, after a place.
_LINES: Final = text("""
    SELECT line.number, line.custom_id, line.job_id, line.outcome, line.place, line.error,
        CAST(result.response AS text) AS response, result.error_code, result.error_message
    FROM (
        SELECT * FROM job_batch_lines
        WHERE batch_id = :id AND file = :file AND place > :after ORDER BY place LIMIT :page
    ) AS line
    LEFT JOIN LATERAL (
        SELECT response, error_code, error_message FROM results
        WHERE results.created_at = line.job_created_at AND results.job_id = line.job_id
        OFFSET 0
    ) AS result ON true
    ORDER BY line.place
""")


@dataclass(frozen=True, slots=True)
class EndedLine:
    """A line with its outcome."""

    number: int
    custom_id: str
    job_id: UUID | None
    outcome: LineOutcome
    place: int
    error: dict[str, Any] | None  #: of one that never was a job
    response: str | None  #: of its job, as JSON in one line
    error_code: str | None
    error_message: str | None


def lines(
    connection: Connection, batch_id: UUID, file: LineFile, *, after: int, page: int
) -> list[EndedLine]:
    """Up to so many lines of a file of a batch, in their places."""
    given = {"id": batch_id, "file": file, "after": after, "page": page}
    return [
        EndedLine(**{**row._mapping, "outcome": LineOutcome(row.outcome)})
        for row in connection.execute(_LINES, given)
    ]
