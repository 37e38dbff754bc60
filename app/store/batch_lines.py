"""Lines of batches as they are told: each with its outcome and its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, text

from app.batches import LineFile, LineOutcome

# The lines of a file, after a place: those before which there are fewer bytes of responses.
_LINES: Final = text("""
    SELECT number, custom_id, job_id, outcome, place, error, CAST(response AS text) AS response,
        error_code, error_message
    FROM (
        SELECT line.*, result.*, sum(pg_column_size(result.response)) OVER (
            ORDER BY line.place ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING
        ) AS bytes_before
        FROM (
            SELECT * FROM job_batch_lines
            WHERE batch_id = :id AND file = :file AND place > :after ORDER BY place LIMIT :page
        ) AS line
        LEFT JOIN LATERAL (
            SELECT response, error_code, error_message FROM results
            WHERE results.created_at = line.job_created_at AND results.job_id = line.job_id
            OFFSET 0
        ) AS result ON true
    ) AS line
    WHERE coalesce(bytes_before, 0) < :page_bytes
    ORDER BY place
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
    connection: Connection,
    batch_id: UUID,
    file: LineFile,
    *,
    after: int,
    page: int,
    page_bytes: int,
) -> list[EndedLine]:
    """Up to so many lines of a file of a batch, in their places; the last one is that with which
    their responses have `page_bytes`, as they are stored."""
    given = {"id": batch_id, "file": file, "after": after, "page": page, "page_bytes": page_bytes}
    return [
        EndedLine(**{**row._mapping, "outcome": LineOutcome(row.outcome)})
        for row in connection.execute(_LINES, given)
    ]
