"""The audit: whether the books balance, from the tables alone.

Each rule is a sentence and a query for the rows that break it, with by how much. It reads one
snapshot of the database and writes nothing. What a living worker has not settled yet, and what a
killed one never told, is no difference: it is counted and named.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Connection, text

from app.books.usage import PARTS
from app.jobs import EARLIEST, LATEST
from app.store.tables import device_cost

MOST_ROWS: Final = 20
"""Of each rule that are named; all are counted."""
BILLING: Final = (
    *("device_ns", "wasted_ns", "cost", "upstream_cost", "price_id", "price"),
    *("energy_nj", "wasted_nj", "energy_method"),
)


@dataclass(frozen=True, slots=True)
class Rule:
    """What has to hold. Its query gives rows of (row, difference), the latter not 0."""

    name: str
    sentence: str
    unit: str  #: of the difference: ns, nano (of money), nJ or rows
    query: str


@dataclass(frozen=True, slots=True)
class Difference:
    rule: Rule
    num_rows: int
    sum_of_differences: int  #: without their signs
    rows: Sequence[tuple[str, int]]  #: the first of them, each with its difference


@dataclass(frozen=True, slots=True)
class Sums:
    """What the windows say, by currency and price; times in nanoseconds."""

    currency: str | None
    num_windows: int
    num_attempts: int
    ns: dict[str, int]  #: by part, and `up`, `stray` and `owed`
    nano: dict[str, int] | None  #: the same in nano-units of money, and `rounding`
    nj: dict[str, int]  #: energy by part, and `up` and `stray`


@dataclass(frozen=True, slots=True)
class Outside:
    """Attempts that are in no window, and why."""

    worker: str
    is_lost: bool  #: its worker was killed; else it has not closed the window yet
    num_attempts: int
    ns: int  #: what their rows say


@dataclass(frozen=True, slots=True)
class Audit:
    sums: Sequence[Sums]
    outside: Sequence[Outside]
    differences: Sequence[Difference]

    @property
    def difference_nano(self) -> int:
        """All differences together; 0 if the books balance."""
        return sum(each.sum_of_differences for each in self.differences)


def _money(ns: str, price: str = "price") -> str:
    """SQL for nano-units: the rule for a time that may be negative."""
    return f"1000000000 * sign(CAST({ns} AS numeric)) * {device_cost(f'abs({ns})', price)}"


_PICKED: Final = """
    picked AS MATERIALIZED (
        SELECT * FROM windows WHERE until_at >= :since AND until_at < :until
    )
"""
_SETTLED: Final = f"""
    {_PICKED}, settled AS MATERIALIZED (
        SELECT
            worker_id, number, sum(device_ns) AS device_ns, sum(wasted_ns) AS wasted_ns,
            sum({_money("device_ns", "picked.price")}) AS nano, count(*) AS attempts,
            sum(each.energy_nj) AS energy_nj, sum(each.wasted_nj) AS wasted_nj
        FROM (
            SELECT worker_id, window_number AS number, device_ns, wasted_ns, energy_nj, wasted_nj
            FROM attempts
        ) AS each
        JOIN picked USING (worker_id, number)
        GROUP BY worker_id, number
    ), told AS (
        SELECT
            picked.*, coalesce(device_ns, 0) AS settled_ns,
            coalesce(wasted_ns, 0) AS settled_waste_ns, coalesce(nano, 0) AS settled_nano,
            coalesce(settled.energy_nj, 0) AS settled_nj,
            coalesce(wasted_nj, 0) AS settled_waste_nj
        FROM picked LEFT JOIN settled USING (worker_id, number)
    )
"""
_WINDOW: Final = "format('window %s of worker %s', number, worker_id)"
_ATTEMPT: Final = "format('attempt %s of job %s', attempts.id, attempts.job_id)"
_IN_PERIOD: Final = "attempts.ended_at >= :since AND attempts.ended_at < :until"
_PART_NS: Final = tuple(f"{part}_ns" for part in PARTS)
_BILL: Final = f"{device_cost('device_ns', 'price')} + coalesce(upstream_cost, 0)"

RULES: Final = (
    Rule(
        "parts",
        "The parts of a window are its up-time.",
        "ns",
        f"""WITH {_PICKED} SELECT {_WINDOW},
            up_ns - {" - ".join(_PART_NS)} FROM picked""",
    ),
    Rule(
        "billed",
        "A window's busy time is what the attempts that were settled in it are billed.",
        "ns",
        f"WITH {_SETTLED} SELECT {_WINDOW}, busy_ns - settled_ns FROM told",
    ),
    Rule(
        "wasted",
        "A window's waste is that of these attempts, and what it names as stray.",
        "ns",
        f"WITH {_SETTLED} SELECT {_WINDOW}, waste_ns - stray_ns - settled_waste_ns FROM told",
    ),
    Rule(
        "money",
        "The price of a window's up-time is that of its jobs, its other parts and its rounding.",
        "nano",
        f"""WITH {_SETTLED} SELECT {_WINDOW}, {_money("up_ns")} - settled_nano
            - {" - ".join(_money(part) for part in _PART_NS if part != "busy_ns")}
            - 1000000000 * rounding FROM told WHERE price IS NOT NULL""",
    ),
    Rule(
        "joules",
        "The parts of a window's energy are its energy.",
        "nJ",
        f"""WITH {_PICKED} SELECT {_WINDOW},
            energy_nj - load_nj - busy_nj - idle_nj - waste_nj - overhead_nj - open_nj
            FROM picked""",
    ),
    Rule(
        "paid",
        "A window's energy of answers is that of the attempts that were settled in it.",
        "nJ",
        f"WITH {_SETTLED} SELECT {_WINDOW}, busy_nj - settled_nj FROM told",
    ),
    Rule(
        "burnt",
        "A window's wasted energy is that of these attempts, and what it names as stray.",
        "nJ",
        f"WITH {_SETTLED} SELECT {_WINDOW}, waste_nj - stray_nj - settled_waste_nj FROM told",
    ),
    Rule(
        "drawn",
        "What energy is open at the end of a window was drawn before; a worker that ended in order "
        "left none.",
        "nJ",
        f"""SELECT {_WINDOW}, CASE WHEN is_last THEN open_nj ELSE least(0, open_nj) END FROM (
            SELECT worker_id, number, is_last, until_at, sum(open_nj) OVER each AS open_nj,
                min(number) OVER (PARTITION BY worker_id) AS first FROM windows
            WINDOW each AS (PARTITION BY worker_id ORDER BY number)) AS level
            WHERE first = 1 AND until_at >= :since AND until_at < :until""",
    ),
    Rule(
        "numbers",
        "The windows of a worker are numbered without a gap.",
        "rows",
        f"""WITH {_PICKED} SELECT {_WINDOW}, number - before - 1 FROM (
            SELECT *, lag(number, 1, number - 1) OVER (PARTITION BY worker_id ORDER BY number)
                AS before FROM picked) AS each""",
    ),
    Rule(
        "open",
        "What is open at the end of a window was computed before, but for what is owed.",
        "ns",
        f"""SELECT {_WINDOW}, least(0, open_ns + owed_ns) FROM (
            SELECT worker_id, number, owed_ns, until_at, sum(open_ns) OVER each AS open_ns,
                min(number) OVER (PARTITION BY worker_id) AS first FROM windows
            WINDOW each AS (PARTITION BY worker_id ORDER BY number)) AS level
            WHERE first = 1 AND until_at >= :since AND until_at < :until""",
    ),
    Rule(
        "closed",
        "A worker that ended in order left nothing open.",
        "ns",
        """SELECT format('worker %s', worker_id), sum(open_ns)
                + max(owed_ns) FILTER (WHERE is_last) FROM windows GROUP BY worker_id
            HAVING bool_or(is_last) AND min(number) = 1
                AND max(until_at) >= :since AND max(until_at) < :until""",
    ),
    Rule(
        "after",
        "No attempt was settled after its worker's last window, or in one that is not there.",
        "ns",
        f"""SELECT {_ATTEMPT}, device_ns + wasted_ns FROM attempts
            JOIN (SELECT worker_id, min(number) AS first, max(number) AS last,
                bool_or(is_last) AS has_ended FROM windows GROUP BY worker_id) AS of_worker
            USING (worker_id)
            WHERE {_IN_PERIOD} AND (has_ended AND window_number > last
                OR window_number BETWEEN first AND last AND NOT EXISTS (
                    SELECT FROM windows WHERE windows.worker_id = attempts.worker_id
                        AND number = window_number))""",
    ),
    Rule(
        "untold",
        "Every attempt that its worker ended names a window.",
        "ns",
        f"""SELECT {_ATTEMPT}, device_ns + wasted_ns + 1 FROM attempts
            WHERE {_IN_PERIOD} AND window_number IS NULL AND outcome <> 'lost'
                AND device_ns + wasted_ns > 0""",
    ),
    Rule(
        "bill",
        "The cost of an attempt follows from its own row.",
        "nano",
        f"""SELECT {_ATTEMPT}, 1000000000 * (coalesce(cost, 0)
                - CASE WHEN price IS NULL THEN 0 ELSE {_BILL} END)
            FROM attempts WHERE {_IN_PERIOD}""",
    ),
    Rule(
        "result",
        "A job is billed what the attempt that ended it is, and nothing without one.",
        "rows",
        f"""SELECT format('result of job %s', results.job_id), 1 FROM results
            LEFT JOIN attempts ON attempts.created_at = results.created_at
                AND attempts.job_id = results.job_id AND attempts.id = results.attempt_id
                AND attempts.outcome IN ('succeeded', 'failed')
            WHERE finished_at >= :since AND finished_at < :until AND CASE
                WHEN attempts.id IS NULL THEN results.device_ns <> 0 OR results.cost <> 0
                ELSE ({", ".join(f"results.{name}" for name in BILLING)})
                    IS DISTINCT FROM ({", ".join(f"attempts.{name}" for name in BILLING)}) END""",
    ),
    Rule(
        "vain",
        "An attempt without a result of its own is billed nothing.",
        "ns",
        f"""SELECT {_ATTEMPT}, device_ns FROM attempts
            WHERE {_IN_PERIOD} AND outcome IN ('lost', 'released')""",
    ),
    Rule(
        "price",
        "What is charged is the price of that id.",
        "nano",
        f"""SELECT row, 1000000000 * abs(price - coalesce(per_device_hour, 0))
                + CAST(given.currency IS DISTINCT FROM prices.currency AS int)
            FROM (SELECT {_ATTEMPT} AS row, price_id, price, currency FROM attempts
                WHERE {_IN_PERIOD} AND price_id IS NOT NULL
                UNION ALL SELECT {_WINDOW}, price_id, price, currency FROM windows
                WHERE until_at >= :since AND until_at < :until AND price_id IS NOT NULL) AS given
            LEFT JOIN prices ON prices.id = price_id""",
    ),
    Rule(
        "batch",
        "A batch took what its attempts did, if none of them was lost.",
        "ns",
        """SELECT format('batch %s', batches.id),
                batches.device_ns - sum(attempts.device_ns + wasted_ns)
            FROM batches JOIN attempts ON batch_id = batches.id
            WHERE batches.claimed_at >= :since AND batches.claimed_at < :until
            GROUP BY batches.id
            HAVING count(*) = num_jobs AND bool_and(ended_at IS NOT NULL AND outcome <> 'lost')""",
    ),
)

# What was broken, how often and by how much; and the first of its rows.
_BROKEN: Final = """
    WITH broken AS MATERIALIZED (
        SELECT * FROM ({query}) AS each("row", difference) WHERE difference <> 0
    )
    SELECT "row", difference, count(*) OVER () AS num_rows, sum(abs(difference)) OVER () AS total
    FROM broken ORDER BY abs(difference) DESC, "row" LIMIT :most
"""

_NS: Final = ("up", *PARTS, "stray", "owed")
_NJ: Final = (*PARTS, "stray")


def _nano(name: str) -> str:
    return "settled_nano" if name == "busy" else _money(f"{name}_ns")


# What the windows of the period say.
_SUMS: Final = text(f"""
    WITH {_SETTLED}
    SELECT
        currency, count(*) AS num_windows,
        coalesce((
            SELECT sum(attempts) FROM settled JOIN picked USING (worker_id, number)
            WHERE picked.currency IS NOT DISTINCT FROM told.currency
        ), 0) AS num_attempts,
        {", ".join(f"sum({name}_ns) AS {name}_ns" for name in _NS)},
        {", ".join(f"sum({_nano(name)}) AS {name}_nano" for name in ("up", *PARTS))},
        sum(energy_nj) AS up_nj, {", ".join(f"sum({name}_nj) AS {name}_nj" for name in _NJ)},
        sum(1000000000 * rounding) AS rounding_nano
    FROM told GROUP BY currency ORDER BY currency
""")

# Attempts that are in no window: of workers that live, and of those that were killed.
_OUTSIDE: Final = text(f"""
    SELECT
        worker_id, lost, count(*) AS num_attempts, sum(device_ns + wasted_ns) AS ns
    FROM attempts
    LEFT JOIN (
        SELECT worker_id, max(number) AS last FROM windows GROUP BY worker_id
    ) AS of_worker USING (worker_id)
    LEFT JOIN (
        SELECT id AS worker_id, stopped_at IS NOT NULL OR lease_expires_at < now() AS lost
        FROM workers
    ) AS known USING (worker_id)
    WHERE {_IN_PERIOD}
        AND (outcome = 'lost' AND window_number IS NULL OR window_number > coalesce(last, 0))
    GROUP BY worker_id, lost ORDER BY worker_id
""")

_SNAPSHOT: Final = (
    "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY",
    "SET LOCAL statement_timeout = 0",
)


def audit(connection: Connection, since: datetime | None, until: datetime | None) -> Audit:
    """Check all rules for the windows that were closed, and what ended, in a period.

    To be the first in its transaction, which it makes a snapshot.
    """
    for statement in _SNAPSHOT:
        connection.execute(text(statement))
    period = {"since": since or EARLIEST, "until": until or LATEST}
    return Audit(
        [_sums(row) for row in connection.execute(_SUMS, period).mappings()],
        [
            Outside(str(row.worker_id), row.lost is not False, row.num_attempts, int(row.ns))
            for row in connection.execute(_OUTSIDE, period)
        ],
        list(_differences(connection, period)),
    )


def _sums(row: Any) -> Sums:
    ns = {name: int(row[f"{name}_ns"]) for name in _NS}
    nano = None
    if row["currency"] is not None:
        nano = {name: int(row[f"{name}_nano"]) for name in ("up", *PARTS, "rounding")}
    nj = {name: int(row[f"{name}_nj"]) for name in ("up", *_NJ)}
    return Sums(row["currency"], row["num_windows"], int(row["num_attempts"]), ns, nano, nj)


def _differences(connection: Connection, period: dict[str, Any]) -> Iterator[Difference]:
    for rule in RULES:
        statement = text(_BROKEN.format(query=rule.query))
        rows = connection.execute(statement, period | {"most": MOST_ROWS}).all()
        if rows:
            named = [(row.row, int(Decimal(row.difference))) for row in rows]
            yield Difference(rule, rows[0].num_rows, int(rows[0].total), named)
