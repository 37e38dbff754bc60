"""How large the tables are, and a way to fill them: for the benchmark of retention. How many
connections there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection, text

from app.store.database import Database


@dataclass(frozen=True, slots=True)
class Size:
    """A table with its indexes and its long values."""

    rows: int
    dead: int  #: row versions that vacuum has not removed yet
    bytes: int

    @property
    def per_row(self) -> float:
        return self.bytes / max(1, self.rows)


_TABLES: Final = ("jobs", "attempts", "results", "batches")

# Rows, dead rows and bytes of a table.
_SIZE: Final = """
    SELECT (SELECT count(*) FROM {table}), pg_total_relation_size('{table}'),
        (SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = '{table}')
"""


def tables(connection: Connection) -> dict[str, Size]:
    """The size of each table that grows with jobs. Counts rows: takes a while."""
    found = {}
    for table in _TABLES:
        rows, size, dead = connection.execute(text(_SIZE.format(table=table))).one()
        found[table] = Size(rows, dead, size)
    return found


# Connections that are open, and the most that there may be of users without privileges.
_CONNECTIONS: Final = text("""
    SELECT
        (SELECT count(*) FROM pg_stat_activity WHERE datid IS NOT NULL),
        CAST(current_setting('max_connections') AS int)
            - CAST(current_setting('superuser_reserved_connections') AS int)
            - CAST(coalesce(current_setting('reserved_connections', true), '0') AS int)
""")


def connections(connection: Connection) -> tuple[int, int]:
    """Those to this server that are open now, and how many it gives out."""
    used, most = connection.execute(_CONNECTIONS).one()
    return used, most


# Ended jobs, each with its attempt and its result; 64 to a batch.
_JOBS: Final = text("""
    INSERT INTO jobs (
        id, model, kind, url, request, fingerprint, source, state, input_tokens, max_output_tokens,
        not_before, created_at, queued_at, claimed_at, finished_at, attempt,
        attempts_charged
    )
    SELECT
        gen_random_uuid(), :model, 'generate', '/v1/completions',
        jsonb_build_object('prompt', CAST(:prompt AS text)), 'f00d', 'api', 'completed', 100, 100,
        made, made, made, made, made, 1, 1
    FROM generate_series(1, :jobs) AS n
    CROSS JOIN LATERAL (
        SELECT now() - (:older_than_s + :jobs - n) * interval '1 s' AS made
    ) AS stamp
""")
_RESULTS: Final = text("""
    INSERT INTO results (
        job_id, model, kind, state, response, created_at, queued_at, finished_at, total_ms
    )
    SELECT id, model, kind, state, jsonb_build_object('choices', request), created_at, queued_at,
        finished_at, 1
    FROM jobs
""")
_ATTEMPTS: Final = text("""
    INSERT INTO attempts (
        id, job_id, number, worker_id, batch_id, claimed_at, ended_at, outcome, charged
    )
    SELECT gen_random_uuid(), id, 1, id, id, claimed_at, finished_at, 'succeeded', true FROM jobs
""")


def fill(database: Database, jobs: int, model: str, prompt: str, *, older_than_s: float) -> None:
    """Write jobs that ended a second apart, the youngest `older_than_s` ago."""
    given = {"jobs": jobs, "model": model, "prompt": prompt, "older_than_s": older_than_s}
    with database.begin() as connection:
        connection.execute(_JOBS, given)
        connection.execute(_RESULTS)
        connection.execute(_ATTEMPTS)
    with database.autocommit() as connection:
        for table in _TABLES:
            connection.execute(text(f"VACUUM ANALYZE {table}"))
