"""Result rows: what every statement that ends a job has in common.

A result is written in the statement that ends its job, and nowhere else.
"""

from __future__ import annotations

from typing import Final

from app.store.notices import telling


def elapsed_ms(start: str, end: str) -> str:
    """SQL for the time between two stamps in ms: null without an end, never negative."""
    since = f"greatest({end} - {start}, interval '0')"
    return f"CASE WHEN {end} IS NOT NULL THEN 1000 * extract(epoch FROM {since}) END"


RECORD_ENDED: Final = f"""
    recorded AS (
        INSERT INTO results (
            job_id, tenant, model, kind, state, attempt_id, batch_id, error_code, error_message,
            created_at, queued_at, claimed_at, finished_at, queue_ms, total_ms
        )
        SELECT
            id, tenant, model, kind, state, last_attempt_id, last_batch_id,
            error_code, error_message, created_at, queued_at, claimed_at, finished_at,
            {elapsed_ms("created_at", "claimed_at")}, {elapsed_ms("created_at", "finished_at")}
        FROM ended
        RETURNING ({telling("SELECT id FROM ended")})  -- once, and not once a row
    )
"""
"""A common table expression: the results of jobs that end without an answer, and the news of them,
which those who wait hear when the transaction commits. It reads a sibling `ended`: columns of
`jobs`, with last_attempt_id, last_batch_id, error_code and error_message."""
