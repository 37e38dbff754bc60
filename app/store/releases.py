"""Release: the move of a job whose attempt ended without a result, back to the queue or to its end.

Fenced, repeatable and locked in order as `app.store.claims` says; rescue gives back as a worker
does, see `GIVE_BACK`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from sqlalchemy import Connection, text

from app.books.energy import EnergyMethod
from app.errors import AttemptsExhausted
from app.jobs import MAX_UNCHARGED, AttemptOutcome, JobState
from app.store.claims import BETTER_METHOD, MONTHS, NO_ANSWER_NJ, SUM_BATCHES, BatchStats
from app.store.delivery import QUEUED_AGAIN
from app.store.encoding import encode
from app.store.lookup import locked
from app.store.results import RECORD_ENDED, copied


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """An attempt given up without a result, so that its job runs again."""

    job_id: UUID
    attempt_id: UUID
    created_at: datetime  #: of the job
    outcome: AttemptOutcome
    charged: bool  #: counts towards the job's max_attempts
    error_code: str | None = None
    error_message: str | None = None  #: shown if this was the last attempt
    wasted_ns: int = 0  #: all that it took of the device's time
    wasted_nj: int | None = None  #: and of its energy; None where nothing is known
    energy_method: EnergyMethod = EnergyMethod.ABSENT


@dataclass(frozen=True, slots=True)
class Released:
    """Where a job went: back to `queued`, or to a final state."""

    job_id: UUID
    attempt_id: UUID
    state: JobState | None  #: None: it was taken from this worker before
    wasted_ns: int  #: what the row of the attempt says now
    wasted_nj: int  #: 0 where nothing is known of it


NEVER_FINISHED: Final = AttemptsExhausted(
    f"The job was interrupted {MAX_UNCHARGED} times, by shutdowns or with its worker."
)

GIVE_BACK: Final = f"""
    next AS MATERIALIZED (
        SELECT *, CASE
            WHEN cancel_requested_at IS NOT NULL THEN 'cancelled'
            WHEN deadline <= now() THEN 'expired'
            WHEN charged AND attempts_charged + 1 >= max_attempts THEN 'failed'
            WHEN attempt - attempts_charged >= {MAX_UNCHARGED} AND NOT charged THEN 'failed'
            ELSE 'queued' END AS next_state
        FROM held
    ), moved AS (
        UPDATE open_jobs SET
            state = 'queued', attempts_charged = open_jobs.attempts_charged + CAST(charged AS int),
            losses = open_jobs.losses + CAST(outcome = 'lost' AS int),
            attempt_id = NULL, batch_id = NULL, queued_at = now(), {QUEUED_AGAIN}
        FROM next WHERE open_jobs.id = next.job_id AND next_state = 'queued'
    ), ended AS (
        DELETE FROM open_jobs USING next
        WHERE open_jobs.id = next.job_id AND next_state <> 'queued'
        RETURNING
            open_jobs.id, input_tokens, {copied("open_jobs")}, open_jobs.attempt_id,
            open_jobs.attempts_charged + CAST(charged AS int) AS attempts_charged,
            losses + CAST(outcome = 'lost' AS int) AS losses, next_state,
            CASE next_state
                WHEN 'failed' THEN
                    CASE WHEN charged THEN error_code ELSE '{NEVER_FINISHED.code}' END
                WHEN 'expired' THEN 'deadline_exceeded' ELSE next_state END AS error_code,
            CASE next_state
                WHEN 'failed' THEN
                    CASE WHEN charged THEN error_message ELSE '{NEVER_FINISHED}' END
                WHEN 'expired' THEN 'The deadline passed before the job could run again.'
                ELSE 'The job was cancelled.' END AS error_message
    ), closed AS (
        UPDATE attempts SET
            ended_at = now(), outcome = next.outcome, charged = next.charged,
            error_code = next.error_code, device_ns = 0, wasted_ns = next.wasted_ns, cost = 0,
            energy_nj = CASE WHEN next.energy_method <> 'absent' THEN 0 END,
            wasted_nj = next.wasted_nj, energy_method = next.energy_method,
            window_number = next.window_number
        FROM next WHERE attempts.created_at = next.created_at
            AND attempts.job_id = next.job_id AND attempts.id = next.attempt_id
    ), {RECORD_ENDED}
    SELECT job_id, attempt_id, next_state, wasted_ns, coalesce(wasted_nj, 0) FROM next
"""
"""What becomes of jobs whose attempt ended without a result. It reads a sibling `held`: the fields
of `Release` and `window_number` beside those of the locked row that decide. A job that was
cancelled or whose deadline passed meanwhile ends so, and one that was given up `MAX_UNCHARGED`
times, though never charged, as failed."""

# Give up attempts. One that was taken from this worker before only has its waste noted, and so has
# one that this very call gave up before, if it is repeated.
_RELEASE: Final = text(f"""
    WITH given AS MATERIALIZED (
        SELECT * FROM jsonb_to_recordset(CAST(:releases AS jsonb)) AS given(
            job_id uuid, attempt_id uuid, created_at timestamptz, outcome text, charged bool,
            error_code text, error_message text, wasted_ns bigint,
            wasted_nj bigint, energy_method text
        )
        ORDER BY job_id
    ), held AS MATERIALIZED (
        SELECT
            given.*, cancel_requested_at, deadline, attempt, attempts_charged, max_attempts,
            CAST(:window_number AS int) AS window_number
        FROM given {locked("given.job_id")}
        WHERE job.state = 'running' AND job.attempt_id = given.attempt_id
    ), noted AS (
        UPDATE attempts SET
            wasted_ns = greatest(attempts.wasted_ns, given.wasted_ns),
            wasted_nj = greatest(attempts.wasted_nj, given.wasted_nj),
            energy_nj = {NO_ANSWER_NJ}, energy_method = {BETTER_METHOD},
            window_number = coalesce(window_number, :window_number)
        FROM given
        WHERE attempts.created_at = given.created_at AND attempts.created_at = ANY({MONTHS})
            AND attempts.job_id = given.job_id AND attempts.id = given.attempt_id
            AND attempts.outcome IN ('lost', 'released')
        RETURNING attempts.job_id, attempts.id, attempts.wasted_ns, attempts.wasted_nj
    ), {SUM_BATCHES}, {GIVE_BACK}
    UNION ALL
    SELECT job_id, id, NULL, wasted_ns, coalesce(wasted_nj, 0) FROM noted
""")


def release(
    connection: Connection,
    releases: Sequence[Release],
    batches: Sequence[BatchStats] = (),
    *,
    window_number: int | None = None,
) -> list[Released]:
    """Give up attempts; returns what their rows say now, and where the jobs went that were still
    held.

    Their jobs are `queued` again, or `failed` if that was their last attempt, or `cancelled` or
    `expired` if that was asked or due. The old message is to be acked: rescue sends a new one.
    """
    given = {
        "releases": encode(releases),
        "batches": encode(batches),
        "batch_ids": [each.id for each in batches],
        "created": [each.created_at for each in releases],
        "window_number": window_number,
    }
    return [
        Released(job_id, attempt_id, JobState(state) if state else None, *wasted)
        for job_id, attempt_id, state, *wasted in connection.execute(_RELEASE, given)
    ]
