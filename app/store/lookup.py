"""Looking up jobs, whatever the planner believes of the table.

A queue is empty when statistics are taken and full when they are used. So conditions on state stay
outside of the lookup: taken inside, they tempt the planner into a partial index that it believes to
be tiny, and to read all of it for every single id.
"""

from __future__ import annotations

from typing import Final

OPEN_MODELS: Final = """
    WITH RECURSIVE found (model) AS (
        (SELECT model FROM open_jobs ORDER BY model LIMIT 1)
        UNION ALL
        SELECT (
            SELECT open_jobs.model FROM open_jobs WHERE open_jobs.model > found.model
            ORDER BY open_jobs.model LIMIT 1
        ) FROM found WHERE found.model IS NOT NULL
    )
"""
"""SQL that begins a query of `found`: the models of open jobs, by steps from each to the next in
the index, however many jobs there are of each; and a null."""


def locked(job_id: str, *, skip: bool = False) -> str:
    """SQL for a lateral join: the open job with this id, locked. `skip`: unless somebody holds it.

    `OFFSET 0` keeps the conditions of the outer query out.
    """
    skipping = " SKIP LOCKED" if skip else ""
    return (
        f"CROSS JOIN LATERAL (SELECT * FROM open_jobs WHERE open_jobs.id = {job_id} OFFSET 0"
        f" FOR NO KEY UPDATE{skipping}) AS job"
    )


def result(job_id: str) -> str:
    """SQL for a lateral join: the result of the job with this id."""
    looked_up = f"SELECT * FROM results WHERE results.job_id = {job_id} OFFSET 0"
    return f"CROSS JOIN LATERAL ({looked_up}) AS job"
