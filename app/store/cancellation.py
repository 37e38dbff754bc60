"""Cancelling jobs: at once while they are queued, by request while they run."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final
from uuid import UUID

from sqlalchemy import Connection, TextClause, text

from app.errors import GristmillError, JobNotFound, JobStateConflict, JobUnreadable
from app.jobs import JobState, Kind
from app.store import submissions
from app.store.delivery import NOT_QUEUED
from app.store.encoding import state_of
from app.store.lookup import locked
from app.store.notices import CANCEL
from app.store.results import RECORD_ENDED
from app.store.submissions import RejectedJob
from app.store.tables import DEFAULT_TENANT


def _cancelling(*, skip: bool) -> TextClause:
    """End those that are queued, ask the workers of those that run, and tell how all were found."""
    return text(f"""
        WITH found AS MATERIALIZED (
            SELECT job.id, job.state FROM unnest(CAST(:ids AS uuid[])) AS given(id)
            {locked("given.id", skip=skip)}
            WHERE tenant = :tenant
        ), ended AS (
            UPDATE jobs SET state = 'cancelled', finished_at = now(), {NOT_QUEUED}
            FROM found WHERE jobs.id = found.id AND found.state = 'queued'
            RETURNING jobs.*,
                CAST(NULL AS uuid) AS last_attempt_id, CAST(NULL AS uuid) AS last_batch_id,
                'cancelled' AS error_code, 'The job was cancelled.' AS error_message
        ), asked AS (
            UPDATE jobs SET cancel_requested_at = coalesce(cancel_requested_at, now())
            FROM found WHERE jobs.id = found.id AND found.state = 'running'
            RETURNING pg_notify('{CANCEL}', CAST(jobs.id AS text))
        ), {RECORD_ENDED}
        SELECT id, CASE state WHEN 'queued' THEN 'cancelled' ELSE state END AS state FROM found
    """)


_CANCEL: Final = _cancelling(skip=False)
_CANCEL_FREE: Final = _cancelling(skip=True)


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
    state = _states(connection, _CANCEL, [job_id], tenant).get(job_id) or JobNotFound()
    if isinstance(state, GristmillError):
        raise state
    return state


def cancel_free(
    connection: Connection, ids: Collection[UUID], *, tenant: str = DEFAULT_TENANT
) -> dict[UUID, JobState | JobUnreadable]:
    """Cancel those of the jobs that nobody holds at this moment; their states.

    Waits for no row, and so keeps nobody waiting who holds one.
    """
    return _states(connection, _CANCEL_FREE, ids, tenant)


def _states(
    connection: Connection, statement: TextClause, ids: Collection[UUID], tenant: str
) -> dict[UUID, JobState | JobUnreadable]:
    rows = connection.execute(statement, {"ids": sorted(set(ids)), "tenant": tenant})
    return {id: state_of(state) for id, state in rows}


def cancel_or_record(connection: Connection, job_id: UUID, kind: Kind) -> JobState:
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
    )
    if submissions.reject(connection, [unread]):
        return JobState.CANCELLED
    return cancel(connection, job_id)
