"""Retention on tables of a million jobs: do they stay small, and do the hot queries stay quick?

An embedded Postgres is filled with ended jobs. Then jobs are submitted, received, claimed and
finished in batches, while retention removes the requests and responses of old ones and deletes the
oldest, as many as come in. Autovacuum works as it is set for these tables. Sizes are those of each
table with its indexes and long values, against the rows in it; times are those of the hot
statements, before and after.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Final

from app.bench.report import machine, print_json, print_table
from app.bench.store import BATCH, DAY_S, MODEL, PROMPT, Store
from app.local.servers import EmbeddedPostgres
from app.store import claims, retention, sizes
from app.store.database import Database
from app.store.migration import migrate
from app.store.sizes import Size

PAGE: Final = 500
KEEP_S: Final = DAY_S
"""Ended jobs of the history are older, those of the churn are not."""


def main(arguments: Seq[str]) -> None:
    options = _parser().parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="gristmill-retention-") as folder,
        EmbeddedPostgres(Path(folder) / "postgres", durable=False) as server,
    ):
        migrate(server.url)
        with closing(Database(server.url, statement_timeout_ms=600_000)) as database:
            store = Store.of(database)
            _fill(database, options.jobs)
            before, quick = _sizes(database), _times(store)
            began = time.monotonic()
            done, removed = _churn(store, options.seconds)
            took_s = time.monotonic() - began
            after, still_quick = _sizes(database), _times(store)
    print(f"{machine()}\n{options.jobs:,} ended jobs; {done:,} more in {took_s:.0f} s, ", end="")
    print(f"{removed:,} rows removed\n")
    _print(before, after, quick, still_quick, done)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench retention", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1_000_000, help="ended jobs at the beginning")
    parser.add_argument("--seconds", type=float, default=60.0, help="of work and removal")
    return parser


def _fill(database: Database, jobs: int) -> None:
    began = time.monotonic()
    sizes.fill(database, jobs, MODEL, PROMPT, age_s=jobs + 2 * KEEP_S, over_s=jobs)
    sizes.vacuum(database)
    print(f"filled in {time.monotonic() - began:.0f} s", flush=True)


def _churn(store: Store, seconds: float) -> tuple[int, int]:
    """Work and remove in turns, at the same pace; how many jobs, and how many rows."""
    done = removed = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for _ in range(8):
            store.run(BATCH)
            done += BATCH
        for step in (
            retention.delete_jobs,
            retention.remove_requests,
            retention.redact_responses,
            retention.delete_batches,
        ):
            removed += store.remove(step, KEEP_S, PAGE)
    return done, removed


def _sizes(database: Database) -> dict[str, Size]:
    with database.begin() as connection:
        return sizes.tables(connection)


def _times(store: Store) -> dict[str, float]:
    """Milliseconds of the hot statements for a batch, medians of 15."""
    found: dict[str, list[float]] = {}
    for _ in range(15):
        for name, seconds in _one_round(store):
            found.setdefault(name, []).append(1000 * seconds)
    return {name: median(times) for name, times in found.items()}


def _one_round(store: Store) -> Iterator[tuple[str, float]]:
    ids = store.submit(BATCH)
    claimed: list[claims.Claimed] = []
    steps: tuple[tuple[str, Callable[[], object]], ...] = (
        ("receive", lambda: store.receive(ids)),
        ("claim", lambda: claimed.extend(store.claim(ids))),
        ("finish", lambda: store.finish(claimed)),
    )
    for name, call in steps:
        began = time.monotonic()
        call()
        yield name, time.monotonic() - began


def _print(
    before: dict[str, Size],
    after: dict[str, Size],
    quick: dict[str, float],
    still_quick: dict[str, float],
    done: int,
) -> None:
    print_table(
        ["table", "rows", "dead", "MB", "bytes/row", "rows after", "dead", "MB", "bytes/row"],
        [[name, *_cells(before[name]), *_cells(after[name])] for name in before],
    )
    print()
    print_table(
        [f"{BATCH} jobs", "ms before", "ms after"],
        [[name, f"{quick[name]:.1f}", f"{still_quick[name]:.1f}"] for name in quick],
    )
    growth = {
        f"{name}_bytes_per_row": round(after[name].per_row / before[name].per_row, 3)
        for name in ("requests", "results", "attempts")
    }
    slower = {f"{name}_time": round(still_quick[name] / quick[name], 2) for name in quick}
    print()
    print_json("retention", growth | slower, jobs_done=done)


def _cells(size: Size) -> list[str]:
    return [
        f"{size.rows:,}",
        f"{size.dead:,}",
        f"{size.bytes / 1e6:.0f}",
        f"{size.per_row:.0f}",
    ]
