"""What it takes to keep the sums of usage, and to ask them.

A bulk loader fills a month with jobs, and the month is asked by day and model: while what they
used lies in deltas, and after it was added to its hours. Then sums are written as a hundred million
jobs of several models, tenants and priorities would have left them, and asked again: an answer
reads a row for each hour and group that there was, however many jobs these had. The triggers'
part of claiming and finishing is measured in turns, with and without them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Final
from uuid import UUID

from sqlalchemy import text

from app.bench.report import machine, print_json, print_table
from app.bench.store import BATCH, DAY_S, MODEL, Store
from app.books.usage import Question, hour_of
from app.local.servers import EmbeddedPostgres
from app.store import sizes, usage
from app.store.database import Database
from app.store.migration import migrate

ROUNDS: Final = 41
ASKED: Final = 5
MONTH_S: Final = 30 * DAY_S
PAGE: Final = 20_000
MANY: Final = 100_000_000
PART: Final = {BATCH: "a full batch", 1: "a lone job"}


def main(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="gristmill-usage-", dir=options.folder) as folder,
        EmbeddedPostgres(Path(folder) / "postgres", durable=False) as server,
    ):
        migrate(server.url)
        with closing(Database(server.url, statement_timeout_ms=600_000)) as database:
            _measure(options, database)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench usage", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1_000_000, help="that are really there")
    parser.add_argument(
        "--groups", type=int, nargs="*", default=[10, 100, 1_000], help="of each hour, for others"
    )
    parser.add_argument("--folder", help="where there is room for the tables")
    return parser


def _measure(options: argparse.Namespace, database: Database) -> None:
    parts = {PART[size]: _part_of_triggers(database, size) for size in PART}
    rows = []
    sizes.fill(database, options.jobs, MODEL, "", age_s=MONTH_S, over_s=MONTH_S)
    rows.append([f"{options.jobs:,} jobs, from deltas", *_asked(database)])
    fold_s = _timed(lambda: _fold(database))
    rows.append([f"{options.jobs:,} jobs", *_asked(database)])
    for groups in options.groups:
        _write_sums(database, groups)
        rows.append([f"as {MANY:,} jobs leave: {groups:,} groups an hour", *_asked(database)])
    print(machine())
    print_table(["a month by day and model", "rows of sums", "ms"], rows)
    print_table(
        ["claim and finish", "with, ms", "without, ms", "ratio"],
        [
            [name, f"{with_ms:.2f}", f"{without_ms:.2f}", f"{with_ms / without_ms:.2f}"]
            for name, (with_ms, without_ms) in parts.items()
        ],
    )
    print_json(
        "usage",
        {name: round(with_ms / without_ms, 3) for name, (with_ms, without_ms) in parts.items()},
        fold_s=round(fold_s, 2),
        asked={name: {"rows": count, "ms": ms} for name, count, ms in rows},
    )


def _asked(database: Database) -> list[str]:
    """Rows that an answer reads, and its milliseconds, the median of some."""
    now = datetime.now(UTC)
    question = Question(
        since=hour_of(now - timedelta(days=32)), until=hour_of(now), by=("day", "model")
    )

    def ask() -> None:
        with database.begin() as connection:
            usage.ask(connection, question)

    with database.begin() as connection:
        count = connection.scalar(text("SELECT count(*) FROM usage")) or 0
    return [f"{count:,}", f"{median(1000 * _timed(ask) for _ in range(ASKED)):.0f}"]


def _fold(database: Database) -> None:
    found = PAGE
    while found == PAGE:
        with database.begin() as connection:
            found = usage.fold(connection, PAGE)
    sizes.vacuum(database, ["usage_hours", "usage_deltas"])


def _write_sums(database: Database, groups: int) -> None:
    """The sums of a month of many jobs, in so many groups of each hour."""
    with database.begin() as connection:
        sizes.write_sums(connection, hours=int(MONTH_S / 3600), groups=groups, jobs=MANY)
    sizes.vacuum(database, ["usage_hours"])


def _part_of_triggers(database: Database, size: int) -> tuple[float, float]:
    """Milliseconds that a batch takes to be claimed and finished, with the triggers and without."""
    store = Store.of(database, prompt="A mill", response="grinds")
    found: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * ROUNDS):
        are_on = bool(turn % 2)
        with database.begin() as connection:
            sizes.switch_sums(connection, are_kept=are_on)
        ids = store.submit(size)
        store.receive(ids)
        found[are_on].append(_timed(partial(_run, store, ids)))
    return 1000 * median(found[True]), 1000 * median(found[False])


def _run(store: Store, ids: Sequence[UUID]) -> None:
    store.finish(store.claim(ids))


def _timed(call: Callable[[], Any]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began
