"""Open jobs over a long history: does what was done slow down what is to be done?

The same is measured in turns on empty tables and on full ones, in two databases of one server. A
bulk loader fills the latter with ended jobs, month by month, and with queued ones. Measured is what
a batch takes to be submitted, received, claimed and finished; what a status, a list, a look of
rescue and a count take; the log that Postgres writes for a job from its submission to its result,
in units of what its request and response hold; and how many updates of open jobs are heap-only.
Then a month of the history is dropped, and the hot table is vacuumed. The embedded Postgres writes
its log as always, but waits for no disk.
"""

from __future__ import annotations

import argparse
import random
import string
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any, Final
from uuid import UUID

from sqlalchemy import make_url, text

from app.bench.report import machine, print_json, print_table
from app.bench.store import BATCH, DAY_S, MODEL, Store
from app.local.servers import EmbeddedPostgres
from app.store import counts, delivery, months, reads, retention, sizes, sweeps
from app.store.database import Database
from app.store.lists import Filter
from app.store.migration import migrate

ROUNDS: Final = 31
PAGE: Final = 500
KEYS_PAGE: Final = 20_000
FIRST_ID: Final = UUID(int=0)
JSON_AROUND: Final = len('{"prompt": ""}') + len('{"choices": [{"text": ""}]}')


def main(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="gristmill-history-", dir=options.folder) as folder,
        EmbeddedPostgres(Path(folder) / "postgres", durable=False) as server,
    ):
        texts = {"prompt": _text(options.prompt_bytes), "response": _text(100)}
        with (
            closing(_database(server.url)) as filled,
            closing(_database(_beside(server.url))) as empty,
        ):
            _measure_all(options, Store.of(empty, **texts), Store.of(filled, **texts))


def _database(url: str) -> Database:
    migrate(url)
    return Database(url, statement_timeout_ms=600_000)


def _beside(url: str) -> str:
    """Another database on the same server."""
    with closing(Database(url)) as database, database.autocommit() as connection:
        connection.execute(text("CREATE DATABASE empty"))
    return make_url(url).set(database="empty").render_as_string(hide_password=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench history", description=__doc__)
    parser.add_argument("--open", type=int, default=100_000, help="queued jobs")
    parser.add_argument("--ended", type=int, default=1_000_000, help="ended jobs")
    parser.add_argument("--months", type=int, default=6, help="over which they ended")
    parser.add_argument("--jobs", type=int, default=3_200, help="that are run to be measured")
    parser.add_argument("--prompt-bytes", type=int, default=1_500)
    parser.add_argument("--folder", help="where there is room for the tables")
    return parser


def _text(size: int) -> str:
    """That nothing can make much shorter."""
    return "".join(random.Random(size).choices(string.ascii_letters + " ", k=size))


def _measure_all(options: argparse.Namespace, reference: Store, store: Store) -> None:
    database = store.database
    began = time.monotonic()
    history_s = options.months * 31 * DAY_S
    sizes.fill(database, options.ended, MODEL, "", age_s=history_s + DAY_S, over_s=history_s)
    sizes.fill(
        database, options.open, MODEL, store.prompt, age_s=DAY_S, over_s=DAY_S / 2, is_open=True
    )
    sizes.vacuum(database)
    filled_s = time.monotonic() - began
    empty, full = _measure([reference, store], options.jobs)
    with database.begin() as connection:
        tables = sizes.tables(connection)
        updated, heap_only = sizes.heap_only(connection, "open_jobs")
    vacuum_s = _timed(lambda: sizes.vacuum(database, ["open_jobs"]))
    dropped, drop_s = _drop_a_month(store)
    print(
        f"{machine()}\n{options.open:,} open and {options.ended:,} ended jobs in {filled_s:.0f} s"
    )
    print_table(
        ["", "empty", "full", "ratio"],
        [
            [name, f"{empty[name]:.2f}", f"{full[name]:.2f}", f"{full[name] / empty[name]:.2f}"]
            for name in empty
        ],
    )
    print_table(
        ["table", "rows", "dead", "MB", "bytes/row"],
        [
            [name, f"{size.rows:,}", f"{size.dead:,}", f"{size.bytes / 1e6:.0f}",
             f"{size.per_row:.0f}"]
            for name, size in tables.items()
        ],
    )  # fmt: skip
    print_json(
        "history",
        {name: round(full[name] / empty[name], 2) for name in empty},
        open=options.open,
        ended=options.ended,
        log_per_job_in_units=round(full["log, bytes a job"] / _unit(store), 2),
        log_per_job_in_units_empty=round(empty["log, bytes a job"] / _unit(store), 2),
        heap_only_share=round(heap_only / max(1, updated), 3),
        vacuum_open_s=round(vacuum_s, 2),
        month_jobs=dropped,
        month_drop_s=round(drop_s, 2),
        month_of_5m_s=round(5_000_000 * drop_s / max(1, dropped), 1),
    )


def _unit(store: Store) -> int:
    """Bytes of a request and its response."""
    return len(store.prompt) + len(store.response) + JSON_AROUND


def _measure(stores: Sequence[Store], jobs: int) -> list[dict[str, float]]:
    """Of each store milliseconds, medians of some rounds, and bytes of the log for each job."""
    found: list[dict[str, list[float]]] = [{} for _ in stores]
    for store in stores:
        store.run(4 * BATCH)  # warm
    for _ in range(ROUNDS):
        for store, times in zip(stores, found, strict=True):
            for name, call in _steps(store):
                times.setdefault(f"{name}, ms", []).append(1000 * _timed(call))
    return [
        {name: median(each) for name, each in times.items()}
        | {"log, bytes a job": _logged_per_job(store, jobs)}
        for store, times in zip(stores, found, strict=True)
    ]


def _logged_per_job(store: Store, jobs: int) -> float:
    before = _logged(store)
    store.run(jobs)
    return (_logged(store) - before) / (jobs // BATCH * BATCH)


def _logged(store: Store) -> int:
    with store.database.begin() as connection:
        return sizes.logged(connection)


def _steps(store: Store) -> list[tuple[str, Callable[[], object]]]:
    """The life of a batch, and what is looked at meanwhile."""
    ids: list[UUID] = []
    claimed: list[Any] = []

    def look(call: Callable[[Any], object]) -> Callable[[], None]:
        def run() -> None:
            with store.database.begin() as connection:
                call(connection)

        return run

    return [
        (f"submit {BATCH}", lambda: ids.extend(store.submit(BATCH))),
        ("receive", lambda: store.receive(ids)),
        ("claim", lambda: claimed.extend(store.claim(ids))),
        ("finish", lambda: store.finish(claimed)),
        ("status", look(lambda c: reads.find(c, ids[:1]))),
        ("list of 50", look(lambda c: reads.list_jobs(c, Filter(model=MODEL)))),
        ("unsent", look(delivery.unsent)),
        ("overdue", look(lambda c: delivery.overdue(c, 10.0, PAGE))),
        ("lost", look(lambda c: sweeps.find_lost(c, PAGE))),
        ("held by the lost", look(lambda c: delivery.free_lost(c, PAGE))),
        ("late", look(lambda c: sweeps.find_late(c, PAGE))),
        ("old requests", look(lambda c: retention.remove_requests(c, 3_650 * DAY_S, PAGE))),
        ("count of the queue", look(counts.queued)),
    ]


def _timed(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def _drop_a_month(store: Store) -> tuple[int, float]:
    """Drop the second oldest month, which is a whole one; its jobs, and the seconds it took."""
    database = store.database
    with database.begin() as connection:
        [_, month, *_] = months.kept(connection, "results")
        before = sizes.tables(connection)["results"].rows
    began = time.monotonic()
    last: UUID | None = FIRST_ID
    with database.begin() as connection:
        assert month in months.over(connection, "results", 1.0)
    while last is not None:
        with database.begin() as connection:
            last = months.forget(connection, month, last, KEYS_PAGE)
    with database.begin() as connection:
        months.drop(connection, month)
    took_s = time.monotonic() - began
    with database.begin() as connection:
        return before - sizes.tables(connection)["results"].rows, took_s
