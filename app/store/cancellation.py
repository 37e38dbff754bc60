"""Cancelling a job: at once while it is queued, by request while it runs."""

from __future__ import annotations

from typing import Final
from uuid import UUID

from sqlalchemy import Connection, text

from app.errors import JobNotFound, JobStateConflict
from app.jobs import JobState, Kind
from app.store import submissions
from app.store.delivery import NOT_QUEUED
from app.store.notices import CANCEL
from app.store.results import RECORD_ENDED
from app.store.submissions import RejectedJob
from app.store.tables import DEFAULT_TENANT

# Lock a job, to decide by its state.
_LOCK: Final = text(
    "SELECT state FROM jobs WHERE id = :job_id AND tenant = :tenant FOR NO KEY UPDATE"
)

# End a queued job as cancelled.
_END_QUEUED: Final = text(f"""
    WITH ended AS (
        UPDATE jobs SET state = 'cancelled', finished_at = now(), {NOT_QUEUED}
        WHERE id = :job_id AND state = 'queued'
        RETURNING *,
            CAST(NULL AS uuid) AS last_attempt_id, CAST(NULL AS uuid) AS last_batch_id,
            'cancelled' AS error_code, 'The job was cancelled.' AS error_message
    ), {RECORD_ENDED}
    SELECT id FROM ended
""")

# Ask the worker of a running job to cut it short.
_ASK_WORKER: Final = text(f"""
    UPDATE jobs SET cancel_requested_at = coalesce(cancel_requested_at, now())
    WHERE id = :job_id AND state = 'running'
    RETURNING pg_notify('{CANCEL}', CAST(id AS text))
""")


def cancel(connection: Connection, job_id: UUID, *, tenant: str = DEFAULT_TENANT) -> JobState:
    """Cancel a job and return its state: `cancelled`, or `running` until its worker has stopped it.

    May be repeated. Raises `JobNotFound`, and `JobStateConflict` if it ended in another way.
    """
    state = connection.scalar(_LOCK, {"job_id": job_id, "tenant": tenant})
    match state:
        case None:
            raise JobNotFound()
        case JobState.CANCELLED:
            return JobState.CANCELLED
        case JobState.QUEUED:
            connection.execute(_END_QUEUED, {"job_id": job_id})
            return JobState.CANCELLED
        case JobState.RUNNING:
            connection.execute(_ASK_WORKER, {"job_id": job_id})
            return JobState.RUNNING
        case _:
            raise JobStateConflict(f"The job is {state} already.")


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
