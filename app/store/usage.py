"""What jobs used, summed by the hour in which they ended: kept current, and asked.

    results ──the trigger note_usage──▶ usage_deltas ──fold──▶ usage_hours

Whoever writes results, the trigger sums what the statement wrote and inserts it beside them: in the
same transaction, so that each ended job is counted once or not at all, as its result is there or
not, however late it commits. These are inserts alone: no two workers wait for one row. Rescue takes
deltas out and adds them to their hours in one statement, so that each is in one of the two tables
at any moment. Questions sum both in one snapshot, and so are current whether rescue is up or not.
Results are never looked at again: retention, purges and hands that delete change nothing.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, TextClause, text

from app.books.usage import (
    LABEL,
    PARTS,
    Answer,
    DeviceTime,
    Filling,
    Question,
    Usage,
    at_real_use,
    in_one_currency,
    num_jobs,
)
from app.errors import RequestError
from app.jobs import FINAL_STATES, LATEST
from app.store.tables import ROLL_UPS, RollUp, device_sums, usage_sums

DRAWN: Final = tuple(part for part in PARTS if part != "open")
"""What energy is for, once it is settled."""

MAX_ROWS: Final = 20_000
"""Of an answer: two years of hours, or a month of days of six hundred groups."""

MAX_JOBS: Final = 1_000_000
"""Most jobs that are read one by one, for what they say in their metadata."""

_STATES: Final = tuple(sorted(FINAL_STATES))
_SUMS: Final = usage_sums.sums
_MONEY: Final = ("cost", "upstream_cost", "charge")
_ENERGY: Final = ("energy_nj", "wasted_nj", "carbon_ug")
_NOT_COUNTS: Final = {*_MONEY, *(f"jobs_{state}" for state in _STATES)}


def _fold(roll_up: RollUp) -> TextClause:
    """SQL that adds a page of deltas to their hours, in the order of these: several may do so at
    once."""
    by, sums, hours = ", ".join(roll_up.by), roll_up.sums, roll_up.hours.name
    return text(f"""
        WITH taken AS (
            DELETE FROM {roll_up.deltas.name} WHERE ctid = ANY(ARRAY(
                SELECT ctid FROM {roll_up.deltas.name} LIMIT :page FOR UPDATE SKIP LOCKED
            ))
            RETURNING *
        ), added AS (
            INSERT INTO {hours} AS kept ({by}, {", ".join(sums)})
            SELECT {by}, {", ".join(f"sum({name})" for name in sums)} FROM taken
            GROUP BY {by} ORDER BY {by}
            ON CONFLICT ({by}) DO UPDATE SET
                {", ".join(f"{name} = kept.{name} + excluded.{name}" for name in sums)}
        )
        SELECT count(*) FROM taken
    """)


_FOLDS: Final = tuple(map(_fold, ROLL_UPS))


def fold(connection: Connection, page: int) -> int:
    """Add up to so many deltas of each kind to the sums of their hours; how many, of the kind that
    had most. Repeat until it is less."""
    return max(connection.scalar(each, {"page": page}) or 0 for each in _FOLDS)


_TOTALS: Final = text(f"""
    SELECT model, currency, {", ".join(f"sum({name}) AS {name}" for name in _SUMS)}
    FROM usage WHERE hour >= :since AND model = ANY(:models)
    GROUP BY model, currency ORDER BY model, currency
""")


def totals(connection: Connection, since: datetime, models: Sequence[str]) -> list[Usage]:
    """What jobs of these models used that ended in that hour or later, by model and currency: sums
    that only grow."""
    question = Question(since=since, until=LATEST, by=("model",))
    rows = connection.execute(_TOTALS, {"since": since, "models": list(models)}).mappings()
    return [_usage(question, dict(row) | {"key_0": row["model"], "is_rest": False}) for row in rows]


_DRAWN: Final = text(f"""
    SELECT {", ".join(f"coalesce(sum({part}_nj), 0) AS {part}" for part in DRAWN)}
    FROM device_time WHERE hour >= :since
""")


def drawn_nj(connection: Connection, since: datetime) -> dict[str, int]:
    """Energy of all devices in windows that closed in that hour or later, by what it was for:
    sums that only grow."""
    row = connection.execute(_DRAWN, {"since": since}).one()
    return {part: int(nj) for part, nj in row._mapping.items()}


# ── questions ───────────────────────────────────────────────────────────────────────────────────

# Ended jobs one by one, each as if it were an hour's sum of one, found by when they ended.
_JOBS: Final = f"""
    SELECT
        finished_at AS hour, tenant, model, priority, price_id, currency, metadata,
        {", ".join(f"CAST(state = '{state}' AS int) AS jobs_{state}" for state in _STATES)},
        CAST(batch_size IS NOT NULL AS int) AS jobs_ran, coalesce(batch_size, 0) AS batch_jobs,
        coalesce(input_tokens, 0) AS input_tokens, coalesce(cached_tokens, 0) AS cached_tokens,
        coalesce(output_tokens, 0) AS output_tokens, device_ns, wasted_ns,
        CAST(coalesce(energy_method, '') = 'measured' AS int) AS jobs_measured,
        CAST(coalesce(energy_method, '') = 'estimated' AS int) AS jobs_estimated,
        {", ".join(f"coalesce({name}, 0) AS {name}" for name in (*_MONEY, *_ENERGY))}
    FROM results
    WHERE finished_at >= :since AND finished_at < :until AND created_at < :until {{where}}
    LIMIT {MAX_JOBS + 1}
"""

_COLUMNS: Final = {"model": "model", "tenant": "tenant", "priority": "priority",
                   "price": "price_id"}  # fmt: skip

# Room to sum groups by hashing: how many there are is only guessed, and sorting all rows for them
# takes several times as long.
_HASHED: Final = text("SET LOCAL work_mem = '128MB'")


def ask(connection: Connection, question: Question) -> Answer:
    """The usage of a period, by group and currency: by time, then those with the most device time
    first; and where the devices' time went. What nobody used has no row.

    Raises `RequestError` for a question with too long an answer, or one about the metadata of too
    many jobs.
    """
    connection.execute(_HASHED)
    statement, given = _statement(question)
    rows = [_usage(question, row) for row in connection.execute(text(statement), given).mappings()]
    devices = _devices(connection, question)
    if max(len(rows), len(devices)) > MAX_ROWS:
        raise RequestError(
            f"The answer has more than {MAX_ROWS:,} rows: ask for a shorter period, by less, or "
            "for less at the top.",
            param="by",
        )
    if question.reads_labels and num_jobs(rows) > MAX_JOBS:
        raise RequestError(
            f"More than {MAX_JOBS:,} jobs ended in this period, and what metadata says is read "
            "from each: ask for a shorter period, or for one model.",
            param="since",
        )
    told = list(at_real_use(in_one_currency(rows), devices, question.span))
    if "price" in question.keys:
        told = _with_prices(connection, told)
    if question.tells_batches:
        told = _with_batches(connection, question, told)
    return Answer(told, devices)


def _devices(connection: Connection, question: Question) -> list[DeviceTime]:
    sums = ", ".join(f"sum({name}) AS {name}" for name in device_sums.sums)
    rows = connection.execute(
        text(f"""
            SELECT {_time(question)} AS time, device, price_id, currency, price, {sums}
            FROM device_time WHERE hour >= :since AND hour < :until
            GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3
            LIMIT {MAX_ROWS + 1}
        """),
        {"since": question.since, "until": question.until, "zone": question.zone},
    ).mappings()
    return [
        DeviceTime(**dict(row) | {name: int(row[name]) for name in device_sums.sums})
        for row in rows
    ]


_PRICES: Final = text("SELECT id, per_device_hour FROM prices WHERE id = ANY(:ids)")


def _with_prices(connection: Connection, rows: Sequence[Usage]) -> list[Usage]:
    ids = {row.group["price"] for row in rows} - {None}
    found = connection.execute(_PRICES, {"ids": list(ids)})
    prices = {row.id: row.per_device_hour for row in found}
    return [replace(row, price=prices.get(row.group["price"])) for row in rows]


def _with_batches(connection: Connection, question: Question, rows: Sequence[Usage]) -> list[Usage]:
    """Rows with how the batches of their time and model were filled."""
    is_by_model = "model" in question.keys
    found: defaultdict[tuple[object, object], Filling] = defaultdict(lambda: Filling(0, 0, 0, 0))
    told = {row.group["model"] for row in rows if is_by_model and not row.is_rest}
    where = "" if question.model is None else " AND model = :model"
    given = {"since": question.since, "until": question.until, "zone": question.zone}
    for time, model, *sums in connection.execute(
        text(f"""
            SELECT {_time(question)}, model, sum(batches), sum(sequences), sum(useful_tokens),
                sum(padded_tokens)
            FROM batch_usage WHERE hour >= :since AND hour < :until {where}
            GROUP BY 1, 2
        """),
        given | {"model": question.model},
    ):
        found[time, model if model in told else None] += Filling(*map(int, sums))
    return [
        replace(row, filling=found.get((_when(question, row), row.group.get("model"))))
        for row in rows
    ]


def _when(question: Question, row: Usage) -> object:
    return row.group[question.span] if question.span else None


def _time(question: Question) -> str:
    """SQL for the begin of the span that an hour is in."""
    if question.span is None:
        return "CAST(NULL AS timestamptz)"
    return f"date_trunc('{question.span}', hour, CAST(:zone AS text))"


def _statement(question: Question) -> tuple[str, dict[str, Any]]:
    """SQL and its parameters. Every name in it is one of ours, and every value a parameter."""
    given: dict[str, Any] = {
        "since": question.since, "until": question.until, "top": question.top
    }  # fmt: skip
    where = ""
    for name in ("tenant", "model", "priority"):
        if (value := getattr(question, name)) is not None:
            where += f" AND {name} = :{name}"
            given[name] = value
    if question.metadata:
        where += " AND metadata @> CAST(:metadata AS jsonb) AND metadata <> '{}'"
        given["metadata"] = json.dumps(dict(question.metadata))
    source = (
        f"({_JOBS.format(where=where)}) AS job"
        if question.reads_labels
        else f"usage WHERE hour >= :since AND hour < :until {where}"
    )
    keys = []
    for place, key in enumerate(question.keys):
        if key.startswith(LABEL):
            keys.append(f"metadata ->> CAST(:label_{place} AS text)")
            given[f"label_{place}"] = key.removeprefix(LABEL)
        else:
            keys.append(_COLUMNS[key])
    if question.span:
        given["zone"] = question.zone
    names = [f"key_{place}" for place in range(len(keys))]
    ranked = "".join(f", {name}" for name in names)
    sums = ", ".join(f"sum({name}) AS {name}" for name in _SUMS)
    told = "".join(f"CASE WHEN place <= :top THEN {name} END AS {name}, " for name in names)
    # `place` ranks the groups of all times together, so that the same ones are told of each.
    return (
        f"""
        WITH part AS (
            SELECT {_time(question)} AS time, currency,
                {"".join(f"{key} AS {name}, " for key, name in zip(keys, names, strict=True))}
                {sums}
            FROM {source}
            GROUP BY time, currency{ranked}
        ), weighed AS (
            SELECT *, sum(device_ns) OVER each AS weight,
                sum({" + ".join(f"jobs_{state}" for state in _STATES)}) OVER each AS jobs
            FROM part WINDOW each AS (PARTITION BY {", ".join(names) or "NULL"})
        ), placed AS (
            SELECT *,
                dense_rank() OVER (ORDER BY weight DESC, jobs DESC{ranked}) AS place
            FROM weighed
        )
        SELECT time, least(place, :top + 1) AS place, place > :top AS is_rest, {told} currency,
            {sums}
        FROM placed
        GROUP BY 1, 2, 3, {"".join(f"{4 + place}, " for place in range(len(keys)))} currency
        ORDER BY time, place, currency
        LIMIT {MAX_ROWS + 1}
    """,
        given,
    )


def _usage(question: Question, row: Any) -> Usage:
    group: dict[str, Any] = {}
    for key in question.by:
        group[key] = row["time"] if key == question.span else row[_name(question, key)]
    counts: dict[str, Any] = {name: int(row[name]) for name in _SUMS if name not in _NOT_COUNTS}
    return Usage(
        group=group,
        is_rest=row["is_rest"],
        currency=row["currency"],
        jobs={state: int(row[f"jobs_{state}"]) for state in _STATES},
        **{name: row[name] for name in _MONEY},
        **counts,
    )


def _name(question: Question, key: str) -> str:
    return f"key_{question.keys.index(key)}"
