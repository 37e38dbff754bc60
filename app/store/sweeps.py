"""What rescue does to rows whose time is over: leases that ran out, deadlines. Wake-ups are of
`delivery`.

In one transaction find a page, which locks its rows and skips those that somebody holds, so that
several rescue processes share the work; then move it. If a page cannot be moved, parts of it can:
rows that are not as they were found are left alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final
from uuid import UUID

from sqlalchemy import Connection, text

from app.jobs import ALONE_AFTER, JobState
from app.store.delivery import LEASE_OVER
from app.store.lookup import locked
from app.store.releases import GIVE_BACK, Released
from app.store.results import RECORD_ENDED

# Find running jobs of workers whose lease is over.
_FIND_LOST: Final = text(f"""
    SELECT id FROM open_jobs
    WHERE state = 'running' AND worker_id IS NOT NULL
        AND {LEASE_OVER.format(worker="open_jobs.worker_id")}
        AND id <> ALL(CAST(:but AS uuid[]))
    LIMIT :page
    FOR NO KEY UPDATE OF open_jobs SKIP LOCKED
""")


def find_lost(connection: Connection, page: int, but: Collection[UUID] = ()) -> list[UUID]:
    """Jobs, other than these few, that run on workers whose lease is over."""
    return list(connection.scalars(_FIND_LOST, {"page": page, "but": list(but)}))


# Take running jobs from workers whose lease is over. A job is charged only if it was the only one
# on its worker, and that holds for those that are run alone because they were lost before: the
# others may be mates of what killed it. They are billed nothing; what they wasted, a worker that
# was only slow may still tell.
_EXPIRE_LEASES: Final = text(f"""
    WITH held AS MATERIALIZED (
        SELECT
            job.id AS job_id, created_at, attempt_id, cancel_requested_at, deadline, attempt,
            attempts_charged, max_attempts, 'lost' AS outcome,
            losses >= {ALONE_AFTER} AS charged, 'worker_lost' AS error_code,
            format('The worker was lost %s times while it ran the job, %s of them with nothing '
                'else running.', losses + 1, attempts_charged + 1) AS error_message,
            0 AS wasted_ns, CAST(NULL AS bigint) AS wasted_nj, 'absent' AS energy_method,
            CAST(NULL AS int) AS window_number
        FROM unnest(CAST(:ids AS uuid[])) AS given(id) {locked("given.id", skip=True)}
        WHERE state = 'running' AND {LEASE_OVER.format(worker="job.worker_id")}
    ), {GIVE_BACK}
""")


def expire_leases(connection: Connection, ids: Sequence[UUID]) -> list[Released]:
    """End the attempts of jobs that were found lost; says where the jobs went."""
    rows = connection.execute(_EXPIRE_LEASES, {"ids": sorted(ids)})
    return [Released(row[0], row[1], JobState(row[2]), row[3], row[4]) for row in rows]


# Find queued jobs whose deadline has passed.
_FIND_LATE: Final = text("""
    SELECT id FROM open_jobs
    WHERE state = 'queued' AND deadline <= now() AND id <> ALL(CAST(:but AS uuid[]))
    ORDER BY deadline LIMIT :page
    FOR NO KEY UPDATE SKIP LOCKED
""")


def find_late(connection: Connection, page: int, but: Collection[UUID] = ()) -> list[UUID]:
    """Queued jobs, other than these few, that are past their deadline."""
    return list(connection.scalars(_FIND_LATE, {"page": page, "but": list(but)}))


# End queued jobs whose deadline has passed.
_EXPIRE_QUEUED: Final = text(f"""
    WITH late AS MATERIALIZED (
        SELECT job.id FROM unnest(CAST(:ids AS uuid[])) AS given(id)
        {locked("given.id", skip=True)}
        WHERE state = 'queued' AND deadline <= now()
    ), ended AS (
        DELETE FROM open_jobs USING late WHERE open_jobs.id = late.id
        RETURNING open_jobs.*, 'expired' AS next_state, 'deadline_exceeded' AS error_code,
            'The deadline passed before the job was run.' AS error_message
    ), {RECORD_ENDED}
    SELECT id FROM ended
""")


def expire_deadlines(connection: Connection, ids: Sequence[UUID]) -> list[UUID]:
    """End queued jobs that were found late; the ids that ended.

    Running ones are their workers' to end, with what they have: the heartbeat tells them.
    """
    return list(connection.scalars(_EXPIRE_QUEUED, {"ids": sorted(ids)}))
