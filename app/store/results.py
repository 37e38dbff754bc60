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


COPIED: Final = (
    "tenant", "model", "kind", "url", "format", "source", "metadata", "priority",
    "max_output_tokens", "not_before", "deadline", "time_limit_s", "max_attempts", "quoted_ms",
    "quoted_p90_ms", "attempt", "enqueued_at", "received_at", "wake_count", "cancel_requested_at",
    "purged_at", "created_at", "queued_at", "claimed_at", "batch_id", "webhook_url",
    "stream_events", "stored",
)  # fmt: skip
"""What a result has of the row of its job, under the same names."""


def copied(table: str) -> str:
    """SQL for these columns of a table or its like."""
    return ", ".join(f"{table}.{column}" for column in COPIED)


RECORD_ENDED: Final = f"""
    recorded AS (
        INSERT INTO results (
            job_id, expected_input_tokens, {", ".join(COPIED)}, attempt_id, attempts_charged,
            losses, state, error_code, error_message, finished_at, queue_ms, total_ms
        )
        SELECT
            id, input_tokens, {copied("ended")}, attempt_id, attempts_charged,
            losses, next_state, error_code, error_message, now(),
            {elapsed_ms("created_at", "claimed_at")}, {elapsed_ms("created_at", "now()")}
        FROM ended
        RETURNING ({telling("SELECT id FROM ended")})  -- once, and not once a row
    )
"""
"""A common table expression: the results of jobs that end without an answer, and the news of them,
which those who wait hear when the transaction commits. It reads a sibling `ended`: rows that were
deleted from `open_jobs`, with next_state, error_code and error_message."""
