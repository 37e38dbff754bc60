"""What an outlook is made of: who waits, what ended lately, and which workers are up.

Reading only, in three statements for all that ask, see `app.intake.outlook`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from sqlalchemy import Connection, text

RUNGS: Final = 100
"""Of the ladder of a model and step of priority: a longer queue is told by the hundredth part."""


@dataclass(frozen=True, slots=True)
class Rung:
    """A job that waits, how many of its model and step wait up to it, and what they ask for."""

    model: str
    step: int  #: place of its list among `Layout.steps`
    created_at: datetime
    id: UUID
    jobs: int
    input_tokens: int
    max_output_tokens: int
    of_last_minute: int  #: of these jobs, those that came within it


# The ladder of each model and step: every job of a short queue, every so many of a long one.
_LADDER: Final = text("""
    SELECT model, step, created_at, id, jobs, input_tokens, max_output_tokens, of_last_minute
    FROM (
        SELECT
            model, step, created_at, id,
            count(*) OVER up_to AS jobs,
            sum(coalesce(input_tokens, 0)) OVER up_to AS input_tokens,
            sum(coalesce(max_output_tokens, 0)) OVER up_to AS max_output_tokens,
            count(*) FILTER (WHERE created_at > now() - interval '1 minute') OVER up_to
                AS of_last_minute,
            count(*) OVER (PARTITION BY model, step) AS total
        FROM (
            SELECT *, width_bucket(priority, CAST(:steps AS int[])) - 1 AS step FROM open_jobs
            WHERE state = 'queued' AND not_before <= now()
        ) AS job
        WINDOW up_to AS (
            PARTITION BY model, step ORDER BY created_at, id ROWS UNBOUNDED PRECEDING
        )
    ) AS placed
    WHERE jobs % greatest(1, total / :rungs) = 0 OR jobs = total
    ORDER BY model, step, jobs
""")


def ladder(connection: Connection, steps: Sequence[int]) -> list[Rung]:
    """Jobs that wait and are due, by model and step of priority, in the order of their coming.

    Reads all open jobs, as counting the queue does: not for every caller.
    """
    rows = connection.execute(_LADDER, {"steps": list(steps), "rungs": RUNGS})
    return [
        Rung(
            row.model,
            row.step,
            row.created_at,
            row.id,
            row.jobs,
            int(row.input_tokens),
            int(row.max_output_tokens),
            row.of_last_minute,
        )
        for row in rows
    ]


@dataclass(frozen=True, slots=True)
class Running:
    """What runs of a model."""

    model: str
    jobs: int
    input_tokens: int
    max_output_tokens: int


_RUNNING: Final = text("""
    SELECT model, count(*) AS jobs, sum(coalesce(input_tokens, 0)) AS input_tokens,
        sum(coalesce(max_output_tokens, 0)) AS max_output_tokens
    FROM open_jobs WHERE worker_id IS NOT NULL AND state = 'running' GROUP BY model
""")


def running(connection: Connection) -> list[Running]:
    """What runs, by the index of what workers have."""
    return [
        Running(row.model, row.jobs, int(row.input_tokens), int(row.max_output_tokens))
        for row in connection.execute(_RUNNING)
    ]


@dataclass(frozen=True, slots=True)
class EndedJob:
    """A job that ran to its end; see `tables.results`."""

    job_id: UUID
    model: str
    priority: int
    due_at: datetime
    started_at: datetime
    finished_at: datetime
    input_tokens: int
    output_tokens: int
    max_output_tokens: int
    device_ns: int
    quoted_ms: float | None
    quoted_p90_ms: float | None


_ENDED: Final = """
    SELECT job_id, model, priority, greatest(created_at, not_before) AS due_at, started_at,
        finished_at, coalesce(input_tokens, 0) AS input_tokens,
        coalesce(output_tokens, 0) AS output_tokens,
        coalesce(max_output_tokens, 0) AS max_output_tokens, device_ns, quoted_ms, quoted_p90_ms
    FROM results
    WHERE started_at IS NOT NULL AND state IN ('completed', 'failed')
"""

# What ended last, newest first, by the index of ends.
_ENDED_SINCE: Final = text(f"""
    {_ENDED} AND finished_at > :since ORDER BY finished_at DESC LIMIT :most
""")

# What of one model was accepted last and has ended, by the index of lists: it is by tenant first.
_ENDED_OF: Final = text(f"""
    SELECT last.* FROM tenants CROSS JOIN LATERAL (
        {_ENDED} AND model = :model AND state = 'completed' AND tenant = tenants.name
        ORDER BY created_at DESC LIMIT :most
    ) AS last
    ORDER BY finished_at DESC LIMIT :most
""")


def ended_since(connection: Connection, since: datetime, most: int) -> list[EndedJob]:
    """Jobs of all tenants that ran and ended after this time, newest first, `most` at most."""
    given = {"since": since, "most": most}
    return [EndedJob(*row) for row in connection.execute(_ENDED_SINCE, given)]


def ended_of(connection: Connection, model: str, most: int) -> list[EndedJob]:
    """Jobs of a model that completed, of all tenants, those that were accepted last."""
    given = {"model": model, "most": most}
    return [EndedJob(*row) for row in connection.execute(_ENDED_OF, given)]


@dataclass(frozen=True, slots=True)
class Up:
    """From when to when a worker was, or is to be, up, and what it serves."""

    models: tuple[str, ...]
    since: datetime
    until: datetime
    is_up: bool


_WORKERS: Final = text("""
    SELECT models, started_at, least(coalesce(stopped_at, lease_expires_at), lease_expires_at)
        AS until, stopped_at IS NULL AND lease_expires_at > now() AS is_up
    FROM workers WHERE lease_expires_at > :since
    ORDER BY started_at DESC LIMIT :most
""")


def workers(connection: Connection, since: datetime, most: int) -> list[Up]:
    """Workers that were up after this time, the last that were started."""
    rows = connection.execute(_WORKERS, {"since": since, "most": most})
    return [Up(tuple(row.models), row.started_at, row.until, row.is_up) for row in rows]
