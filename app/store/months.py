"""The months in which `requests`, `attempts` and `results` are kept: a partition each, all of a job
in the one in which it was accepted.

A month goes as a whole once nothing in it is to be kept: dropping a partition costs the same
however full it is, and leaves nothing for vacuum. Only the keys of its jobs are deleted one by one,
for they are unique over all months. Before that, or where a role may not drop tables, the pages of
`retention` take out what is due.

Partitions are made ahead. A row for which there is none is in the default partition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Self
from uuid import UUID

from sqlalchemy import Connection, text

TABLES: Final = {
    "requests": "",
    "attempts": "fillfactor = 50, ",  # each is updated once, when it ends
    "results": "",
}
"""The tables in months, and what their partitions have beside these settings."""
_AGEING: Final = "autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_limit = 2000"

AHEAD: Final = 2
"""Months that are made before they begin."""

_LOCK_TIMEOUT_MS: Final = 100
"""Making and dropping a partition locks its table, and whoever comes after waits behind it: only
shortly. Another time nobody may be in the way."""


@dataclass(frozen=True, slots=True, order=True)
class Month:
    year: int
    number: int  #: from 1

    @classmethod
    def of(cls, stamp: datetime) -> Self:
        utc = stamp.astimezone(UTC)
        return cls(utc.year, utc.month)

    @property
    def next(self) -> Month:
        return Month(self.year + self.number // 12, self.number % 12 + 1)

    @property
    def begin(self) -> datetime:
        return datetime(self.year, self.number, 1, tzinfo=UTC)

    def partition(self, table: str) -> str:
        """Its name."""
        return f"{table}_{self.year:04}_{self.number:02}"


def upcoming(now: datetime) -> Iterator[Month]:
    """This month, and those that are made ahead."""
    month = Month.of(now)
    for _ in range(1 + AHEAD):
        yield month
        month = month.next


_NOW: Final = text("SELECT now()")

# The partitions of a table.
_PARTITIONS: Final = text("""
    SELECT relname FROM pg_inherits JOIN pg_class ON oid = inhrelid
    WHERE inhparent = CAST(:name AS regclass) AND relname ~ '_[0-9]{4}_[0-9]{2}$'
""")


def kept(connection: Connection, table: str) -> list[Month]:
    """The months that a table has partitions for, oldest first."""
    names = connection.scalars(_PARTITIONS, {"name": table})
    return sorted(Month(*map(int, name.split("_")[-2:])) for name in names)


def prepare(connection: Connection) -> int:
    """Make the partitions of this month and the next ones, where they are missing; how many.

    A month that has begun in the default partition stays there.
    """
    now = connection.execute(_NOW).all()[0][0]
    missing = [
        (table, month)
        for table in TABLES
        for month in sorted(set(upcoming(now)) - set(kept(connection, table)))
        if month > Month.of(now) or _is_empty(connection, f"{table}_default")
    ]
    for table, month in missing:
        make(connection, table, month)
    return len(missing)


def make(connection: Connection, table: str, month: Month) -> None:
    """Make a month's partition of a table."""
    _wait_shortly(connection)
    connection.execute(
        text(
            f"CREATE TABLE IF NOT EXISTS {month.partition(table)} PARTITION OF {table}"
            f" FOR VALUES FROM ('{month.begin}') TO ('{month.next.begin}')"
            f" WITH ({TABLES[table]}{_AGEING})"
        )
    )


def _is_empty(connection: Connection, table: str) -> bool:
    return not connection.scalar(text(f"SELECT EXISTS (SELECT FROM {table})"))


# Whether all that was accepted in a month has been final for so long.
_IS_OVER: Final = text("""
    SELECT :until <= now() - :keep_s * interval '1 s' AND NOT EXISTS (
        SELECT FROM results
        WHERE created_at >= :since AND created_at < :until
            AND finished_at >= now() - :keep_s * interval '1 s'
    ) AND NOT EXISTS (
        SELECT FROM open_jobs WHERE created_at >= :since AND created_at < :until
    ) AND NOT EXISTS (
        SELECT FROM job_batches WHERE ended_at IS NULL AND created_at < :until
    )
""")


def over(connection: Connection, table: str, keep_s: float) -> list[Month]:
    """The months of a table whose jobs have all been final for `keep_s`, oldest first."""
    return [
        month
        for month in kept(connection, table)
        if connection.scalar(
            _IS_OVER,
            {"since": month.begin, "until": month.next.begin, "keep_s": keep_s},
        )
    ]


# Delete the keys of a page of a month's jobs, in the order of their ids; the last of these.
_FORGET: Final = """
    WITH page AS MATERIALIZED (
        SELECT job_id FROM {partition}
        WHERE job_id > CAST(:after AS uuid) ORDER BY job_id LIMIT :page
    ), forgotten AS (
        DELETE FROM job_keys USING page WHERE job_keys.id = page.job_id
    )
    SELECT job_id FROM page ORDER BY job_id DESC LIMIT 1
"""


def forget(connection: Connection, month: Month, after: UUID, page: int) -> UUID | None:
    """Delete the keys of the month's next jobs after this one; the last of them, None if there is
    none left."""
    statement = text(_FORGET.format(partition=month.partition("results")))
    last: UUID | None = connection.scalar(statement, {"after": after, "page": page})
    return last


def drop(connection: Connection, month: Month, tables: Sequence[str] = tuple(TABLES)) -> int:
    """Drop a month that is over, of all tables or of some; of how many."""
    for table in tables:
        _wait_shortly(connection)
        connection.execute(text(f"DROP TABLE IF EXISTS {month.partition(table)}"))
    return len(tables)


def _wait_shortly(connection: Connection) -> None:
    connection.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT_MS}ms'"))
