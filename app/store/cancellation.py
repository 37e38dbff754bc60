"""Cancelling jobs: at once while they are queued, by request while they run."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final
from uuid import UUID

from sqlalchemy import Connection, TextClause, text

from app.errors import GristmillError, JobNotFound, JobStateConflict, JobUnreadable
from app.jobs import JobState, Kind
from app.store import submissions
from app.store.encoding import state_of
from app.store.lookup import locked, result
from app.store.results import RECORD_ENDED
from app.store.submissions import RejectedJob
from app.store.tables import DEFAULT_TENANT

# Lock open jobs, to decide by their states. What follows are statements of their own: one that
# waited for a row would check its constraints with the row as it was before, and would not see the
# result of a job that ended meanwhile.
_LOCKING: Final = "SELECT job.id, job.state FROM unnest(CAST(:ids AS uuid[])) AS given(id) {} {}"
_OF_TENANT: Final = "WHERE job.tenant = :tenant"
_LOCK: Final = text(_LOCKING.format(locked("given.id"), _OF_TENANT))
_LOCK_FREE: Final = text(_LOCKING.format(locked("given.id", skip=True), _OF_TENANT))

# The states of jobs that are not open any more.
_ENDED: Final = text(f"""
    SELECT given.id, job.state FROM unnest(CAST(:ids AS uuid[])) AS given(id) {result("given.id")}
    {_OF_TENANT}
""")

# End queued jobs as cancelled.
_END_QUEUED: Final = text(f"""
    WITH ended AS (
        DELETE FROM open_jobs WHERE id = ANY(CAST(:ids AS uuid[]))
        RETURNING *, 'cancelled' AS next_state, 'cancelled' AS error_code,
            'The job was cancelled.' AS error_message
    ), {RECORD_ENDED}
    SELECT id FROM ended
""")

# Ask the workers of running jobs to cut them short.
_ASK_WORKERS: Final = text("""
    UPDATE open_jobs SET cancel_requested_at = coalesce(cancel_requested_at, now())
    WHERE id = ANY(CAST(:ids AS uuid[]))
""")

# Find who runs jobs that were cancelled.
_WHO_RUNS: Final = text("""
    SELECT worker_id, array_agg(id) AS job_ids FROM open_jobs
    WHERE id = ANY(CAST(:ids AS uuid[])) AND state = 'running' AND cancel_requested_at IS NOT NULL
    GROUP BY worker_id
""")


def cancel(connection: Connection, job_id: UUID, *, tenant: str = DEFAULT_TENANT) -> JobState:
    """Cancel a job and return its state: `cancelled`, or `running` until its worker has stopped it.

    May be repeated. Raises as `end` does, and `JobStateConflict` if it ended in another way.
    """
    state = end(connection, job_id, tenant=tenant)
    if state not in (JobState.CANCELLED, JobState.RUNNING):
        raise JobStateConflict(f"The job is {state} already.")
    return state


def end(connection: Connection, job_id: UUID, *, tenant: str = DEFAULT_TENANT) -> JobState:
    """Cancel a job unless it has ended, and hold its row; its state. Raises `JobNotFound`
    and `JobUnreadable`."""
    state = _cancel(connection, _LOCK, [job_id], tenant).get(job_id) or JobNotFound()
    if isinstance(state, GristmillError):
        raise state
    return state


def cancel_free(
    connection: Connection, ids: Collection[UUID], *, tenant: str = DEFAULT_TENANT
) -> dict[UUID, JobState | JobUnreadable]:
    """Cancel those of the jobs that nobody holds at this moment; their states.

    Waits for no row, and so keeps nobody waiting who holds one.
    """
    return _cancel(connection, _LOCK_FREE, ids, tenant)


def _cancel(
    connection: Connection, lock: TextClause, ids: Collection[UUID], tenant: str
) -> dict[UUID, JobState | JobUnreadable]:
    given = {"ids": sorted(set(ids)), "tenant": tenant}
    states = {id: state_of(state) for id, state in connection.execute(lock, given)}
    if rest := [id for id in given["ids"] if id not in states]:
        rows = connection.execute(_ENDED, given | {"ids": rest})
        states |= {id: state_of(state) for id, state in rows}
    if queued := [id for id, state in states.items() if state == JobState.QUEUED]:
        connection.execute(_END_QUEUED, {"ids": queued})
    if running := [id for id, state in states.items() if state == JobState.RUNNING]:
        connection.execute(_ASK_WORKERS, {"ids": running})
    return states | dict.fromkeys(queued, JobState.CANCELLED)


def who_runs(connection: Connection, ids: Collection[UUID]) -> dict[UUID, list[UUID]]:
    """The workers that are to be told of cancels, and the jobs of each."""
    rows = connection.execute(_WHO_RUNS, {"ids": list(ids)})
    return {row.worker_id: row.job_ids for row in rows}


def cancel_or_record(
    connection: Connection, job_id: UUID, kind: Kind, *, tenant: str = DEFAULT_TENANT
) -> JobState:
    """Cancel a job whose message was revoked, perhaps before anybody had read it.

    A job without a row gets one that is cancelled, so that whoever asks for it hears what became of
    it, and the message finds it ended if it still comes. Raises as `cancel` does.
    """
    unread = RejectedJob(
        id=job_id,
        kind=kind,
        state=JobState.CANCELLED,
        error_code="cancelled",
        error_message="The job was cancelled before its message was read.",
        tenant=tenant,
    )
    if submissions.reject(connection, [unread]):
        return JobState.CANCELLED
    return cancel(connection, job_id, tenant=tenant)
