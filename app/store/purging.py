"""Purging a job: what it says leaves its rows at the caller's word, what it took stays.

Content is the request, the response, the metadata, the idempotency key, the request's fingerprint,
the URL of its webhook and the error's text. State, times, tokens and cost are the books.
"""

from __future__ import annotations

from typing import Final
from uuid import UUID

from sqlalchemy import Connection, text

from app.jobs import JobState
from app.store import cancellation
from app.store.tables import DEFAULT_TENANT

# Remove what a job says from its rows, one of which is locked, or ended. `claims._FINISH` writes no
# response of a job that was purged while it ran.
_PURGE: Final = text("""
    WITH known AS (
        UPDATE job_keys SET fingerprint = NULL, idempotency_key = NULL WHERE id = :job_id
        RETURNING created_at
    ), asked AS (
        DELETE FROM requests USING known
        WHERE requests.created_at = known.created_at AND requests.job_id = :job_id
    ), running AS (
        UPDATE open_jobs SET metadata = '{}', purged_at = coalesce(purged_at, now())
        WHERE id = :job_id
    ), told AS (  -- at its own URL; what is still to be told keeps that until then
        DELETE FROM webhook_deliveries
        WHERE event_id = :job_id AND endpoint_id IS NULL AND state <> 'pending'
    )
    UPDATE results SET
        response = NULL, error_message = NULL, metadata = '{}', webhook_url = NULL,
        purged_at = coalesce(purged_at, now())
    FROM known WHERE results.created_at = known.created_at AND results.job_id = :job_id
""")


def purge(connection: Connection, job_id: UUID, *, tenant: str = DEFAULT_TENANT) -> JobState:
    """Remove what a job says, now and for good; its state. May be repeated.

    A queued job is cancelled with it. A running one is asked to stop, and never gets a response.
    Raises `JobNotFound`.
    """
    state = cancellation.end(connection, job_id, tenant=tenant)
    connection.execute(_PURGE, {"job_id": job_id})
    return state
