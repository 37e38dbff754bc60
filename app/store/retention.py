"""How long things are kept: requests and responses leave their rows, whole jobs are deleted.

Every statement takes a page of what has been final for longest, and skips rows that somebody holds,
so several rescue processes share the work. Repeat one until its page is not full. A row that lost
its request or its response keeps all the rest: state, timing and cost. A result that is still to be
written into a file of its batch stays until it is.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, TextClause, text

BEFORE_S: Final = 3_600
"""Windows are deleted so much sooner than jobs."""

_UNWRITTEN: Final = """
    EXISTS (
        SELECT FROM job_batch_lines AS line JOIN job_batches AS batch ON batch.id = line.batch_id
        WHERE line.job_id = results.job_id AND batch.ended_at IS NULL
    )
"""
"""SQL: a result that is still to be written into a file of its batch."""

# Remove the requests of jobs that ended long ago. Open jobs need theirs.
_REMOVE_REQUESTS: Final = text("""
    WITH due AS MATERIALIZED (
        SELECT requests.created_at, requests.job_id
        FROM requests CROSS JOIN LATERAL (
            SELECT FROM results
            WHERE results.created_at = requests.created_at AND results.job_id = requests.job_id
                AND finished_at < now() - :keep_s * interval '1 s'
            OFFSET 0  -- oldest first, each looked up: never all of a month
        ) AS ended
        WHERE requests.created_at < now() - :keep_s * interval '1 s'
        ORDER BY requests.created_at, requests.job_id LIMIT :page
        FOR UPDATE OF requests SKIP LOCKED
    )
    DELETE FROM requests USING due
    WHERE requests.created_at = due.created_at AND requests.job_id = due.job_id
""")

# Remove the responses of jobs that ended long ago.
_REDACT_RESPONSES: Final = text(f"""
    WITH due AS MATERIALIZED (
        SELECT created_at, job_id FROM results
        WHERE response IS NOT NULL AND finished_at < now() - :keep_s * interval '1 s'
            AND NOT {_UNWRITTEN}
        ORDER BY finished_at LIMIT :page
        FOR NO KEY UPDATE SKIP LOCKED
    )
    UPDATE results SET response = NULL FROM due
    WHERE results.created_at = due.created_at AND results.job_id = due.job_id
""")

# Delete jobs that ended long ago; their attempts and results go with them.
_DELETE_JOBS: Final = text(f"""
    WITH due AS MATERIALIZED (
        SELECT created_at, job_id FROM results
        WHERE finished_at < now() - :keep_s * interval '1 s' AND NOT {_UNWRITTEN}
        ORDER BY finished_at LIMIT :page
        FOR UPDATE SKIP LOCKED
    ), requested AS (
        DELETE FROM requests USING due
        WHERE requests.created_at = due.created_at AND requests.job_id = due.job_id
    ), tried AS (
        DELETE FROM attempts USING due
        WHERE attempts.created_at = due.created_at AND attempts.job_id = due.job_id
    ), known AS (
        DELETE FROM job_keys USING due WHERE job_keys.id = due.job_id
    )
    DELETE FROM results USING due
    WHERE results.created_at = due.created_at AND results.job_id = due.job_id
""")

# Delete batches whose last member ended long ago. A batch may mix tenants and belongs to none.
_DELETE_BATCHES: Final = text("""
    WITH due AS MATERIALIZED (
        SELECT id FROM batches
        WHERE claimed_at < now() - :keep_s * interval '1 s'
            AND coalesce(finished_at, claimed_at) < now() - :keep_s * interval '1 s'
        ORDER BY claimed_at LIMIT :page
        FOR UPDATE SKIP LOCKED
    )
    DELETE FROM batches USING due WHERE batches.id = due.id
""")


# Delete windows that were closed long ago: each a little before the attempts that were settled in
# it, so that the audit never misses what it sums.
_DELETE_WINDOWS: Final = text(f"""
    WITH due AS MATERIALIZED (
        SELECT worker_id, number FROM windows
        WHERE until_at < now() - greatest(0, :keep_s - {BEFORE_S}) * interval '1 s'
        ORDER BY until_at, number LIMIT :page
        FOR UPDATE SKIP LOCKED
    )
    DELETE FROM windows USING due
    WHERE windows.worker_id = due.worker_id AND windows.number = due.number
""")

# Delete lines of callers' batches that ended long ago. Most of these have none any more: the ones
# that ended last come first.
_DELETE_LINES: Final = text("""
    WITH due AS MATERIALIZED (
        SELECT line.* FROM (
            SELECT id FROM job_batches WHERE ended_at < now() - :keep_s * interval '1 s'
            ORDER BY ended_at DESC
        ) AS batch CROSS JOIN LATERAL (
            SELECT batch_id, number FROM job_batch_lines WHERE batch_id = batch.id
            LIMIT :page FOR UPDATE SKIP LOCKED
        ) AS line
        LIMIT :page
    )
    DELETE FROM job_batch_lines USING due
    WHERE job_batch_lines.batch_id = due.batch_id AND job_batch_lines.number = due.number
""")

# Delete these batches, with what lines they have.
_DELETE_CALLERS_BATCHES: Final = text("""
    WITH due AS MATERIALIZED (
        SELECT id FROM job_batches WHERE ended_at < now() - :keep_s * interval '1 s'
        ORDER BY ended_at LIMIT :page
        FOR UPDATE SKIP LOCKED
    )
    DELETE FROM job_batches USING due WHERE job_batches.id = due.id
""")


def remove_requests(connection: Connection, keep_s: float, page: int) -> int:
    """Remove the requests of jobs that have been final for `keep_s`; how many."""
    return _done(connection, _REMOVE_REQUESTS, keep_s=keep_s, page=page)


def redact_responses(connection: Connection, keep_s: float, page: int) -> int:
    """Set to null the responses of jobs that have been final for `keep_s`; how many."""
    return _done(connection, _REDACT_RESPONSES, keep_s=keep_s, page=page)


def delete_jobs(connection: Connection, keep_s: float, page: int) -> int:
    """Delete jobs that have been final for `keep_s`, with attempts and results; how many.

    A message that comes after that would make the job anew: keep jobs for longer than Redis keeps
    unacknowledged messages.
    """
    return _done(connection, _DELETE_JOBS, keep_s=keep_s, page=page)


def delete_batches(connection: Connection, keep_s: float, page: int) -> int:
    """Delete batches whose statistics have been final for `keep_s`; how many."""
    return _done(connection, _DELETE_BATCHES, keep_s=keep_s, page=page)


def delete_windows(connection: Connection, keep_s: float, page: int) -> int:
    """Delete windows of workers that were closed `keep_s` ago, less an hour; how many."""
    return _done(connection, _DELETE_WINDOWS, keep_s=keep_s, page=page)


def delete_lines(connection: Connection, keep_s: float, page: int) -> int:
    """Delete lines of callers' batches that ended `keep_s` ago; how many."""
    return _done(connection, _DELETE_LINES, keep_s=keep_s, page=page)


def delete_callers_batches(connection: Connection, keep_s: float, page: int) -> int:
    """Delete these batches themselves; how many."""
    return _done(connection, _DELETE_CALLERS_BATCHES, keep_s=keep_s, page=page)


def _done(connection: Connection, statement: TextClause, **given: object) -> int:
    return connection.execute(statement, given).rowcount
