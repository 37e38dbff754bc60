"""What rescue does to rows: leases that ran out, lost wake-ups, deadlines.

Every statement takes a page and skips rows that somebody holds, so several rescue processes share
the work. Repeat one until its page is not full. A queued job needs a wake-up if it was never sent
(`unsent`), or if its message seems lost in Redis (`overdue`); what a dead worker had received
counts as never sent (`return_received`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, Row, text

from app.jobs import ALONE_AFTER, JobState, Kind
from app.store.claims import GIVE_BACK, Released
from app.store.results import RECORD_ENDED
from app.store.submissions import KNOWN_KIND

_LEASE_OVER: Final = """
    NOT EXISTS (SELECT FROM workers WHERE workers.id = {worker} AND lease_expires_at > now())
"""

# Take running jobs from workers whose lease is over. A job is charged only if it was the only one
# on its worker, and that holds for those that are run alone because they were lost before: the
# others may be mates of what killed it. Their device time is not known: it stays null, and a worker
# that was only slow may still report it.
_EXPIRE_LEASES: Final = text(f"""
    WITH held AS MATERIALIZED (
        SELECT
            id AS job_id, attempt_id, batch_id, cancel_requested_at, deadline, attempt,
            attempts_charged, max_attempts, 'lost' AS outcome,
            losses >= {ALONE_AFTER} AS charged, 0.0 AS delay_s, 'worker_lost' AS error_code,
            format('The worker was lost %s times while it ran the job, %s of them with nothing '
                'else running.', losses + 1, attempts_charged + 1) AS error_message,
            CAST(NULL AS bigint) AS device_ns, CAST(NULL AS numeric) AS cost
        FROM jobs
        WHERE state = 'running' AND {_LEASE_OVER.format(worker="jobs.worker_id")}
        LIMIT :page
        FOR NO KEY UPDATE OF jobs SKIP LOCKED
    ), {GIVE_BACK}
""")


def expire_leases(connection: Connection, page: int) -> list[Released]:
    """End the attempts of dead workers as `lost`; says where their jobs went."""
    rows = connection.execute(_EXPIRE_LEASES, {"page": page})
    return [Released(row[0], row[1], JobState(row[2])) for row in rows]


# Forget that workers received jobs whose lease is over now.
_RETURN_RECEIVED: Final = text(f"""
    WITH orphan AS MATERIALIZED (
        SELECT id FROM jobs
        WHERE state = 'queued' AND received_by IS NOT NULL
            AND {_LEASE_OVER.format(worker="jobs.received_by")}
        LIMIT :page
        FOR NO KEY UPDATE OF jobs SKIP LOCKED
    )
    UPDATE jobs SET received_by = NULL, enqueued_at = NULL
    FROM orphan WHERE jobs.id = orphan.id
""")


def return_received(connection: Connection, page: int) -> int:
    """Jobs whose message died with the worker that received it count as never sent; how many."""
    return connection.execute(_RETURN_RECEIVED, {"page": page}).rowcount


# End queued jobs whose deadline has passed.
_EXPIRE_QUEUED: Final = text(f"""
    WITH late AS MATERIALIZED (
        SELECT id FROM jobs WHERE state = 'queued' AND deadline <= now()
        ORDER BY deadline LIMIT :page
        FOR NO KEY UPDATE SKIP LOCKED
    ), ended AS (
        UPDATE jobs SET state = 'expired', finished_at = now()
        FROM late WHERE jobs.id = late.id
        RETURNING jobs.*,
            CAST(NULL AS uuid) AS last_attempt_id, CAST(NULL AS uuid) AS last_batch_id,
            'deadline_exceeded' AS error_code,
            'The deadline passed before the job was run.' AS error_message
    ), {RECORD_ENDED}
    SELECT id FROM ended
""")


def expire_deadlines(connection: Connection, page: int) -> list[UUID]:
    """End queued jobs that are past their deadline; the ids that ended.

    Running ones are their workers' to end, with what they have: the heartbeat tells them.
    """
    return list(connection.scalars(_EXPIRE_QUEUED, {"page": page}))


@dataclass(frozen=True, slots=True)
class WakeUp:
    """A job whose message is to be sent. Its row stays locked until the transaction ends."""

    id: UUID
    model: str
    kind: Kind
    priority: int


def _wake_up(row: Row[Any]) -> WakeUp:
    return WakeUp(row.id, row.model, Kind(row.kind), row.priority)


_UNSENT: Final = "state = 'queued' AND received_by IS NULL AND enqueued_at IS NULL"

# The models of jobs that have no message, by steps from each to the next in the index.
_UNSENT_MODELS: Final = text(f"""
    WITH RECURSIVE found (model) AS (
        (SELECT model FROM jobs WHERE {_UNSENT} ORDER BY model LIMIT 1)
        UNION ALL
        SELECT (
            SELECT jobs.model FROM jobs WHERE {_UNSENT} AND jobs.model > found.model
            ORDER BY jobs.model LIMIT 1
        ) FROM found WHERE found.model IS NOT NULL
    )
    SELECT model FROM found WHERE model IS NOT NULL
""")


def unsent_models(connection: Connection) -> list[str]:
    """The models of all queued jobs without a message, due or not."""
    return list(connection.scalars(_UNSENT_MODELS))


# Jobs of a model that are due and whose message was never sent: by priority, then oldest first.
_FIND_UNSENT: Final = text(f"""
    SELECT job.* FROM unnest(CAST(:priorities AS int[])) AS given(priority)
    CROSS JOIN LATERAL (
        SELECT id, model, kind, priority FROM jobs
        WHERE {_UNSENT} AND model = :model AND priority = given.priority AND not_before <= now()
            AND {KNOWN_KIND}
            AND (attempt > 0 OR not_before > created_at
                OR created_at <= now() - :grace_s * interval '1 s')
        ORDER BY not_before LIMIT :page
        FOR NO KEY UPDATE SKIP LOCKED
    ) AS job
    LIMIT :page
""")


def unsent(
    connection: Connection, model: str, priorities: Sequence[int], page: int, grace_s: float
) -> list[WakeUp]:
    """Due jobs without a message, of the first of these priorities that have some.

    Send them, then `intake.mark_enqueued` in this transaction. Whoever just committed a new job
    that is due is about to send its message; `grace_s` is the time for that.
    """
    given = {"model": model, "priorities": list(priorities), "page": page, "grace_s": grace_s}
    return [_wake_up(row) for row in connection.execute(_FIND_UNSENT, given)]


# Jobs of one model whose message was sent so long ago that it may be lost, oldest first.
_OVERDUE: Final = text(f"""
    SELECT id, model, kind, priority FROM jobs
    WHERE state = 'queued' AND received_by IS NULL AND model = :model AND not_before <= now()
        AND {KNOWN_KIND}
        AND enqueued_at < now() - :lost_after_s * interval '1 s'
        AND enqueued_at < now() - :lost_after_s * 2 ^ least(wake_count, 16) * interval '1 s'
    ORDER BY enqueued_at LIMIT :page
    FOR NO KEY UPDATE SKIP LOCKED
""")


def overdue(connection: Connection, model: str, lost_after_s: float, page: int) -> list[WakeUp]:
    """The oldest jobs of a model that nobody has received for `lost_after_s` × 2^wake_count.

    That is normal in a long queue. Ask only for as many as `count_unreceived` exceeds the queue
    in Redis by, and send and mark them as with `unsent`.
    """
    rows = connection.execute(
        _OVERDUE, {"model": model, "lost_after_s": lost_after_s, "page": page}
    )
    return [_wake_up(row) for row in rows]


# Count what should lie in the queues of Redis, by model.
_COUNT_UNRECEIVED: Final = text("""
    SELECT model, count(*) FROM jobs
    WHERE state = 'queued' AND received_by IS NULL AND enqueued_at IS NOT NULL
    GROUP BY model
""")


def count_unreceived(connection: Connection) -> dict[str, int]:
    """Jobs by model whose message was sent and not received: at least so long is each queue.

    Reads an index entry for each, which takes some tenths of a second for a million.
    """
    return {row[0]: row[1] for row in connection.execute(_COUNT_UNRECEIVED)}
