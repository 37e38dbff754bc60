"""Work on batches: their lines become jobs, and the ends of these are their outcomes.

Each batch is worked on by one process at a time, its keeper, under a lease by the database's clock.
Every move is one transaction that begins with `held`: it locks the batch and tells whether it still
is this keeper's. So a line becomes a job once, and is counted once, whoever dies when: what was not
committed was not done, and the next keeper finds the batch at the place that was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, text

from app.batches import BatchState, Counts, LineFile, LineOutcome, end_of, outcome_of
from app.errors import GristmillError
from app.jobs import JobState
from app.store.encoding import encode
from app.store.job_batches import COLUMNS, BatchView, view_of


class NotHeld(GristmillError):
    """Another process works on this batch now, or nobody has to any more."""


# Take batches that nobody works on, and keep those that one has.
_TAKE: Final = text(f"""
    WITH due AS MATERIALIZED (
        SELECT id FROM job_batches
        WHERE ended_at IS NULL
            AND (keeper_id IS NULL OR keeper_id = :keeper_id OR keeper_until < now())
        ORDER BY id LIMIT :most
        FOR NO KEY UPDATE SKIP LOCKED
    ), taken AS (
        UPDATE job_batches SET
            keeper_id = :keeper_id, keeper_until = now() + :lease_s * interval '1 s'
        FROM due WHERE job_batches.id = due.id
        RETURNING job_batches.*
    )
    SELECT {COLUMNS} FROM taken ORDER BY id
""")

_RELEASE: Final = text("""
    UPDATE job_batches SET keeper_id = NULL, keeper_until = NULL
    WHERE keeper_id = :keeper_id AND ended_at IS NULL
""")

# Lock a batch, and keep it for another lease.
_HELD: Final = text(f"""
    UPDATE job_batches SET keeper_until = now() + :lease_s * interval '1 s'
    WHERE id = :id AND keeper_id = :keeper_id AND ended_at IS NULL
    RETURNING {COLUMNS}
""")


def take(connection: Connection, keeper_id: UUID, lease_s: float, most: int) -> list[BatchView]:
    """Up to so many open batches, oldest first, that are this keeper's from now on."""
    given = {"keeper_id": keeper_id, "lease_s": lease_s, "most": most}
    return [view_of(row) for row in connection.execute(_TAKE, given)]


def release(connection: Connection, keeper_id: UUID) -> None:
    """Let others take at once what this keeper had."""
    connection.execute(_RELEASE, {"keeper_id": keeper_id})


def held(connection: Connection, keeper_id: UUID, lease_s: float, batch_id: UUID) -> BatchView:
    """The batch, locked. Raises `NotHeld` if it is not this keeper's any more."""
    given = {"id": batch_id, "keeper_id": keeper_id, "lease_s": lease_s}
    row = connection.execute(_HELD, given).one_or_none()
    if row is None:
        raise NotHeld()
    return view_of(row)


# ── before it runs ──────────────────────────────────────────────────────────────────────────────

_REFUSE: Final = text("""
    UPDATE job_batches SET
        state = 'failed', ended_at = now(), errors = CAST(:errors AS jsonb), model = :model
    WHERE id = :id AND state = 'validating'
""")
_BEGIN: Final = text("""
    UPDATE job_batches SET
        state = 'in_progress', in_progress_at = now(), total = :total, model = :model
    WHERE id = :id AND state = 'validating'
""")


@dataclass(frozen=True, slots=True)
class LineError:
    """What is wrong with a line, as OpenAI's batches tell it."""

    code: str
    message: str
    line: int | None
    param: str | None


def refuse(
    connection: Connection, batch: BatchView, errors: Sequence[LineError], model: str | None
) -> None:
    """It has failed: nothing of it runs."""
    connection.execute(_REFUSE, {"id": batch.id, "errors": encode(errors), "model": model})


def begin(connection: Connection, batch: BatchView, total: int, model: str | None) -> None:
    """Its lines are right, and so many."""
    connection.execute(_BEGIN, {"id": batch.id, "total": total, "model": model})


# ── lines become jobs ───────────────────────────────────────────────────────────────────────────

_ADD_LINES: Final = text("""
    INSERT INTO job_batch_lines (
        batch_id, tenant, number, custom_id, job_id, job_created_at, error, outcome, file, place
    )
    SELECT
        :batch_id, :tenant, number, custom_id, job_id,
        CASE WHEN job_id IS NULL THEN NULL ELSE now() END, error, outcome, file, place
    FROM jsonb_populate_recordset(NULL::job_batch_lines, CAST(:lines AS jsonb))
""")
_FED: Final = text("""
    UPDATE job_batches SET
        fed = fed + :num_lines, fed_bytes = :fed_bytes, fed_rows = :fed_rows
    WHERE id = :id
""")


@dataclass(frozen=True, slots=True)
class FedLine:
    """A line that became a job, or else has its outcome."""

    number: int
    custom_id: str
    job_id: UUID | None = None
    outcome: LineOutcome | None = None
    error: dict[str, Any] | None = None  #: of one that was refused: status, code, message, param


@dataclass(frozen=True, slots=True)
class _Line:
    """A row of `job_batch_lines`."""

    number: int
    custom_id: str
    job_id: UUID | None
    error: dict[str, Any] | None
    outcome: LineOutcome | None
    file: LineFile | None
    place: int | None


def feed(
    connection: Connection,
    batch: BatchView,
    lines: Sequence[FedLine],
    *,
    fed_bytes: int,
    fed_rows: int,
) -> None:
    """Note what became of the next lines; their jobs are written in the same transaction. The next
    ones begin at `fed_bytes`, after so many rows."""
    ended = [line.outcome for line in lines if line.outcome is not None]
    counts, places = batch.counts.placed(batch.door, ended)
    following = iter(places)
    rows = []
    for line in lines:
        file, place = next(following) if line.outcome is not None else (None, None)
        rows.append(
            _Line(line.number, line.custom_id, line.job_id, line.error, line.outcome, file, place)
        )
    given = {"batch_id": batch.id, "tenant": batch.tenant, "lines": encode(rows)}
    connection.execute(
        _FED,
        {
            "id": batch.id,
            "num_lines": len(lines),
            "fed_bytes": fed_bytes,
            "fed_rows": fed_rows,
        },
    )
    connection.execute(_ADD_LINES, given)
    _count(connection, batch, counts)


# ── jobs end ────────────────────────────────────────────────────────────────────────────────────

# Open lines whose jobs have ended. Each is looked up by its key, in its month.
_ENDED: Final = text("""
    SELECT line.number, result.state, result.input_tokens, result.cached_tokens,
        result.output_tokens
    FROM (
        SELECT number, job_id, job_created_at FROM job_batch_lines
        WHERE batch_id = :id AND outcome IS NULL OFFSET 0
    ) AS line
    CROSS JOIN LATERAL (
        SELECT state, input_tokens, cached_tokens, output_tokens FROM results
        WHERE results.created_at = line.job_created_at AND results.job_id = line.job_id
        OFFSET 0
    ) AS result
    LIMIT :page
""")

# Open lines whose jobs were deleted by hand.
_LOST: Final = text("""
    SELECT number FROM job_batch_lines AS line
    WHERE batch_id = :id AND outcome IS NULL
        AND NOT EXISTS (SELECT FROM job_keys WHERE job_keys.id = line.job_id)
    LIMIT :page
""")

_END_LINES: Final = text("""
    UPDATE job_batch_lines AS line SET
        outcome = ended.outcome, file = ended.file, place = ended.place,
        error = coalesce(ended.error, line.error)
    FROM jsonb_populate_recordset(NULL::job_batch_lines, CAST(:lines AS jsonb)) AS ended
    WHERE line.batch_id = :id AND line.number = ended.number
""")

_COUNT: Final = text("""
    UPDATE job_batches SET
        succeeded = :succeeded, errored = :errored, cancelled = :cancelled, expired = :expired,
        output = :output, error_lines = :errors,
        input_tokens = input_tokens + :input_tokens,
        cached_tokens = cached_tokens + :cached_tokens,
        output_tokens = output_tokens + :output_tokens
    WHERE id = :id
""")

_GONE: Final = {
    "status": 410,
    "code": "job_removed",
    "message": "The job of this line was deleted.",
}


def collect(connection: Connection, batch: BatchView, page: int) -> int:
    """Give their outcomes to up to so many lines whose jobs have ended; how many."""
    rows = connection.execute(_ENDED, {"id": batch.id, "page": page}).all()
    outcomes = {row.number: outcome_of(JobState(row.state)) for row in rows}
    tokens = {
        name: sum(getattr(row, name) or 0 for row in rows)
        for name in ("input_tokens", "cached_tokens", "output_tokens")
    }
    return _end_lines(connection, batch, outcomes, None, tokens)


def give_up_lost(connection: Connection, batch: BatchView, page: int) -> int:
    """The same for lines whose jobs are not there any more."""
    numbers = connection.scalars(_LOST, {"id": batch.id, "page": page}).all()
    return _end_lines(connection, batch, dict.fromkeys(numbers, LineOutcome.ERRORED), _GONE, {})


def _end_lines(
    connection: Connection,
    batch: BatchView,
    outcomes: dict[int, LineOutcome],
    error: dict[str, Any] | None,
    tokens: dict[str, int],
) -> int:
    if not outcomes:
        return 0
    counts, places = batch.counts.placed(batch.door, outcomes.values())
    lines = [
        _Line(number, "", None, error, outcome, file, place)
        for (number, outcome), (file, place) in zip(outcomes.items(), places, strict=True)
    ]
    connection.execute(_END_LINES, {"id": batch.id, "lines": encode(lines)})
    _count(connection, batch, counts, **tokens)
    return len(lines)


def _count(
    connection: Connection,
    batch: BatchView,
    counts: Counts,
    *,
    input_tokens: int = 0,
    cached_tokens: int = 0,
    output_tokens: int = 0,
) -> None:
    given = {
        name: getattr(counts, name)
        for name in ("succeeded", "errored", "cancelled", "expired", "output", "errors")
    }
    tokens = {
        "input_tokens": input_tokens,
        "cached_tokens": cached_tokens,
        "output_tokens": output_tokens,
    }
    connection.execute(_COUNT, given | tokens | {"id": batch.id})


# Jobs of open lines, to be cancelled; those that are told to stop are left out.
_OPEN_JOBS: Final = text("""
    SELECT line.job_id FROM job_batch_lines AS line
    JOIN open_jobs ON open_jobs.id = line.job_id
    WHERE line.batch_id = :id AND line.outcome IS NULL AND open_jobs.cancel_requested_at IS NULL
    LIMIT :page
""")


def open_jobs(connection: Connection, batch: BatchView, page: int) -> list[UUID]:
    """Up to so many jobs of a batch that nobody has cancelled yet."""
    return list(connection.scalars(_OPEN_JOBS, {"id": batch.id, "page": page}))


# ── its files ───────────────────────────────────────────────────────────────────────────────────

_BEGIN_FILE: Final = {
    LineFile.OUTPUT: text("""
        UPDATE job_batches SET output_file_id = coalesce(output_file_id, :file_id) WHERE id = :id
    """),
    LineFile.ERRORS: text("""
        UPDATE job_batches SET error_file_id = coalesce(error_file_id, :file_id) WHERE id = :id
    """),
}


def begin_file(connection: Connection, batch: BatchView, file: LineFile, file_id: UUID) -> None:
    """Note which file lines are told in."""
    connection.execute(_BEGIN_FILE[file], {"id": batch.id, "file_id": file_id})


_FINALIZE: Final = text("""
    UPDATE job_batches SET state = 'finalizing', finalizing_at = now()
    WHERE id = :id AND state = 'in_progress'
""")
_END: Final = text("""
    UPDATE job_batches SET
        state = :state, ended_at = now(), finalizing_at = coalesce(finalizing_at, now()),
        keeper_id = NULL, keeper_until = NULL
    WHERE id = :id
""")


def finalize(connection: Connection, batch: BatchView) -> None:
    """No line is open: its files are to be written."""
    connection.execute(_FINALIZE, {"id": batch.id})


def end(connection: Connection, batch: BatchView) -> BatchState:
    """Its files are there: it has ended, and this is how."""
    state = end_of(batch.state, batch.counts)
    connection.execute(_END, {"id": batch.id, "state": state})
    return state
