"""How large the tables are, and a way to fill them, for benchmarks. How many connections there
are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import Connection, text

from app.store import months
from app.store.database import Database
from app.store.months import Month
from app.store.tables import usage_sums

SUMS: Final = usage_sums.sums


@dataclass(frozen=True, slots=True)
class Size:
    """A table with its indexes and its long values."""

    rows: int
    dead: int  #: row versions that vacuum has not removed yet
    bytes: int

    @property
    def per_row(self) -> float:
        return self.bytes / max(1, self.rows)


_TABLES: Final = ("job_keys", "requests", "open_jobs", "attempts", "results", "batches")

# Rows, bytes and dead rows of a table, or of all its partitions.
_SIZE: Final = """
    SELECT (SELECT count(*) FROM {table}), CAST(sum(pg_total_relation_size(relid)) AS bigint),
        CAST(sum(n_dead_tup) AS bigint)
    FROM pg_stat_user_tables WHERE relid = '{table}'::regclass
        OR relid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = '{table}'::regclass)
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


def logged(connection: Connection) -> int:
    """Bytes that Postgres has written into its log, by all and ever."""
    position = "SELECT CAST(pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0') AS bigint)"
    return int(connection.execute(text(position)).scalar_one())


def heap_only(connection: Connection, table: str) -> tuple[int, int]:
    """Updates of a table's rows since it was made, and how many of them were heap-only."""
    connection.execute(text("SELECT pg_stat_force_next_flush()"))
    found = connection.execute(
        text(
            "SELECT pg_stat_get_tuples_updated(CAST(:table AS regclass)),"
            " pg_stat_get_tuples_hot_updated(CAST(:table AS regclass))"
        ),
        {"table": table},
    ).one()
    return found[0], found[1]


# Ids of version 7, as `app.jobs.new_id` makes them.
_MADE: Final = """
    SELECT stamp, CAST(
        lpad(to_hex(CAST(1000 * extract(epoch FROM stamp) AS bigint)), 12, '0') || '7'
        || substr(random, 14, 3) || '8' || substr(random, 18, 15) AS uuid
    ) AS id
    FROM generate_series(CAST(:first AS bigint), CAST(:last AS bigint)) AS n
    CROSS JOIN LATERAL (
        SELECT now() - (:age_s - n * :apart_s) * interval '1 s' AS stamp,
            replace(CAST(gen_random_uuid() AS text), '-', '') AS random
    ) AS each
"""

_WITH_REQUESTS: Final = f"""
    WITH made AS MATERIALIZED ({_MADE}), known AS (
        INSERT INTO job_keys (id, created_at, fingerprint)
        SELECT id, stamp, decode(repeat('f00d', 16), 'hex') FROM made
    ), asked AS (
        INSERT INTO requests (job_id, created_at, request)
        SELECT id, stamp, jsonb_build_object('prompt', CAST(:prompt AS text)) FROM made
        WHERE :has_prompts
    )
"""

# Ended jobs with all that is of them.
_ENDED: Final = text(f"""
    {_WITH_REQUESTS}, tried AS (
        INSERT INTO attempts (
            id, created_at, job_id, number, worker_id, batch_id, claimed_at, ended_at, outcome,
            charged, device_ns, wasted_ns, energy_method
        )
        SELECT gen_random_uuid(), stamp, id, 1, id, id, stamp, stamp, 'succeeded', true, 0, 0,
            'absent'
        FROM made
    )
    INSERT INTO results (
        job_id, model, kind, url, source, state, response, not_before, created_at, queued_at,
        claimed_at, finished_at, total_ms, attempt, attempts_charged
    )
    SELECT id, :model, 'generate', '/v1/completions', 'api', 'completed',
        CASE WHEN :has_prompts THEN jsonb_build_object('text', CAST(:prompt AS text)) END,
        stamp, stamp, stamp, stamp, stamp, 1, 1, 1
    FROM made
""")

# Queued jobs whose messages were sent.
_OPEN: Final = text(f"""
    {_WITH_REQUESTS}
    INSERT INTO open_jobs (
        id, model, kind, url, source, state, input_tokens, max_output_tokens, not_before,
        created_at, queued_at, enqueued_at
    )
    SELECT id, :model, 'generate', '/v1/completions', 'api', 'queued', 100, 100, stamp, stamp,
        stamp, stamp
    FROM made
""")

CHUNK: Final = 100_000


def fill(
    database: Database,
    jobs: int,
    model: str,
    prompt: str,
    *,
    age_s: float,
    over_s: float,
    is_open: bool = False,
) -> None:
    """Write ended jobs, or open ones, the first `age_s` old, spread over `over_s`. Without a prompt
    they are as old ones are: without request and response."""
    now = datetime.now(UTC)
    month, last = (Month.of(now - timedelta(seconds=s)) for s in (age_s, age_s - over_s))
    while month <= last:
        with database.begin() as connection:
            for table in months.TABLES:
                months.make(connection, table, month)
        month = month.next
    given = {"model": model, "prompt": prompt, "has_prompts": bool(prompt), "age_s": age_s}
    given["apart_s"] = over_s / max(1, jobs)
    for first in range(0, jobs, CHUNK):
        chunk = {"first": first, "last": min(first + CHUNK, jobs) - 1}
        with database.begin() as connection:
            connection.execute(_OPEN if is_open else _ENDED, given | chunk)


def vacuum(database: Database, tables: Sequence[str] = _TABLES) -> None:
    with database.autocommit() as connection:
        for table in tables:
            connection.execute(text(f"VACUUM ANALYZE {table}"))


# Sums as jobs of a month would have left them: twenty models, and tenants and priorities of each.
_SUMS: Final = text(f"""
    INSERT INTO usage_hours (hour, tenant, model, priority, price_id, currency, {", ".join(SUMS)})
    SELECT
        date_trunc('hour', now() - n * interval '1 hour', 'UTC'), 'tenant ' || groups / 200,
        'model ' || groups % 20, groups / 20 % 10, 'cpu', 'EUR',
        {", ".join("CAST(:jobs AS bigint) / CAST(:hours AS bigint) / :groups" for _ in SUMS)}
    FROM generate_series(1, CAST(:hours AS int)) AS n
    CROSS JOIN generate_series(0, CAST(:groups AS int) - 1) AS groups
""")


def write_sums(connection: Connection, *, hours: int, groups: int, jobs: int) -> None:
    """The sums of so many jobs over so many hours, in so many groups of each; no others."""
    connection.execute(text("TRUNCATE usage_hours, usage_deltas"))
    connection.execute(_SUMS, {"hours": hours, "groups": groups, "jobs": jobs})


def switch_sums(connection: Connection, *, are_kept: bool) -> None:
    """Keep sums of what is written, or do not."""
    move = "ENABLE" if are_kept else "DISABLE"
    for table in ("results", "batches"):
        connection.execute(text(f"ALTER TABLE {table} {move} TRIGGER USER"))
