"""Jobs that do nothing: what the queue itself takes, beside a plain Celery worker.

Contestants, in turns, on the same Redis and Postgres: jobs through HTTP in bulk, in single POSTs
(16 at a time) and by plain `send_task`, with a stub engine; and a plain Celery worker that commits
one row a result, with its prefork and its thread pool. Time counts from the first submission to the
last result that is committed. CPU seconds are those of each part, its children included; `producer`
is this process. Flower is off, as it is beside the plain worker. Before that, one POST of the
largest bulk at a time, with nothing waiting: how long until its whole answer is read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import httpx
import psutil
import psycopg
from celery import Celery

from app.bench import plain_celery
from app.bench.outcomes import good
from app.bench.own_system import OwnSystem, eventually, model_entry
from app.bench.report import machine, print_json, print_table, spread
from app.config.settings import Settings
from gristmill_client import AsyncClient, Client

BODY: Final = {"prompt": "x", "max_tokens": 1}
LARGEST: Final = 10_000
"""Jobs of a bulk, as `api.max_bulk_items` has it by default."""
ANSWERED: Final = f"one HTTP bulk of {LARGEST:,} on an empty system, answered"
CALLERS: Final = 16
"""Of single POSTs at once."""
POLL_S: Final = 0.1
TIMEOUT_S: Final = 300.0
POOLS: Final = {"prefork": 2, "threads": 8}
"""Of the plain worker, with their concurrency: what was best on two cores."""

_COUNT: Final = "SELECT count(*) FROM results WHERE state = 'completed'"
# Counts only while there is nothing to do: it takes more of Postgres the more jobs have ended.
_ARE_DONE: Final = f"SELECT NOT EXISTS (SELECT FROM open_jobs) AND ({_COUNT}) >= %s"


@dataclass(frozen=True, slots=True)
class Heat:
    """What one contestant took for its jobs."""

    jobs: int
    answered_s: float  #: until all submissions were answered
    seconds: float
    cpu_s: dict[str, float]  #: by part

    @property
    def rate(self) -> float:
        return self.jobs / self.seconds

    def cpu_ms(self, part: str) -> float:
        """A job."""
        return 1000 * self.cpu_s.get(part, 0.0) / self.jobs


class Race:
    """The running system, and one heat after the other on it."""

    def __init__(self, system: OwnSystem) -> None:
        self._settings: Settings = system.settings
        self._url = system.settings.database.url
        self._roots = [
            (part.name.lower().partition("-")[0], psutil.Process(part.pid))
            for part in system.parts
            if part.pid
        ]

    def bulk(self, number: int) -> Heat:
        def submit() -> None:
            with Client(self._settings.api.url) as client:
                for answer in client.submit_many([{"body": BODY}] * number):
                    good(answer)

        return self._ours(number, submit)

    def largest(self) -> Heat:
        """One bulk in one POST; the client would send it in pages."""
        content = json.dumps({"jobs": [{"body": BODY}] * LARGEST})
        with httpx.Client(base_url=self._settings.api.url, timeout=TIMEOUT_S) as client:

            def submit() -> None:
                headers = {"Content-Type": "application/json"}
                client.post("/v1/jobs/bulk", content=content, headers=headers).raise_for_status()

            return self._ours(LARGEST, submit)

    def posts(self, number: int) -> Heat:
        async def call(client: AsyncClient, count: int) -> None:
            for _ in range(count):
                await client.submit(BODY)

        async def submit() -> None:
            async with AsyncClient(self._settings.api.url) as client, asyncio.TaskGroup() as group:
                for _ in range(CALLERS):
                    group.create_task(call(client, number // CALLERS))

        return self._ours(number // CALLERS * CALLERS, lambda: asyncio.run(submit()))

    def send_task(self, number: int) -> Heat:
        with Celery(broker=self._settings.broker.url, set_as_current=False) as service:
            return self._ours(number, lambda: _send(service, "inference.generate", number))

    def plain(self, number: int, pool: str) -> Heat:
        redis_url = self._settings.broker.url
        with psycopg.connect(self._url, autocommit=True, dbname="plain") as connection:
            connection.execute(f"TRUNCATE {plain_celery.TABLE}")
            with _plain_worker(pool, redis_url, self._url) as worker:
                app = plain_celery.app
                app.conf.broker_url = redis_url
                _send(app, plain_celery.TASK, 64)
                find = f"SELECT count(*) >= %s FROM {plain_celery.TABLE}"
                _wait(connection, find, 64)
                roots = [*self._roots, ("worker", worker)]
                return _heat(
                    number,
                    roots,
                    lambda: _send(app, plain_celery.TASK, number),
                    lambda: _wait(connection, find, 64 + number),
                )

    def make_table(self) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            connection.execute("CREATE DATABASE plain")
        with psycopg.connect(self._url, autocommit=True, dbname="plain") as connection:
            connection.execute(
                f"CREATE TABLE {plain_celery.TABLE} (id uuid PRIMARY KEY, response jsonb, "
                "finished_at timestamptz NOT NULL DEFAULT now())"
            )

    def _ours(self, number: int, submit: Callable[[], object]) -> Heat:
        with psycopg.connect(self._url, autocommit=True) as connection:
            [done] = connection.execute(_COUNT).fetchone() or (0,)
            return _heat(
                number, self._roots, submit, lambda: _wait(connection, _ARE_DONE, done + number)
            )

    def await_workers(self, number: int) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            _wait(connection, "SELECT count(*) >= %s FROM workers", number)


def main(arguments: Seq[str]) -> None:
    options = _parser().parse_args(arguments)
    heats: dict[str, list[Heat]] = {}
    with OwnSystem("", model_entry(max_batch_size=64, max_wait_ms=20)) as system:
        for part in system.parts:
            if part.name == "flower":
                part.stop(1)
        system.parts = [part for part in system.parts if part.name != "flower"]
        for number in range(1, options.workers):
            system.add_worker(number + 1)
        race = Race(system)
        race.await_workers(options.workers)
        race.make_table()
        contestants: dict[str, Callable[[int], Heat]] = {
            "HTTP bulk": race.bulk,
            "HTTP single POSTs": race.posts,
            "send_task": race.send_task,
            **{
                f"plain Celery, {pool}": lambda number, pool=pool: race.plain(number, pool)  # type: ignore[misc]
                for pool in POOLS
            },
        }
        chosen = [name for name in contestants if not options.only or options.only in name]
        for warm_up in (race.bulk, race.posts, race.send_task):
            warm_up(128)
        rounds = options.rounds if options.only in ANSWERED else 0
        largest = [race.largest() for _ in range(rounds)]
        for number in range(options.rounds):
            for name in chosen:
                heat = contestants[name](options.jobs)
                heats.setdefault(name, []).append(heat)
                print(f"round {number + 1}: {name}: {heat.rate:.0f} jobs/s", flush=True)
    _print(options.jobs, heats, [heat.answered_s for heat in largest])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench jobs", description=__doc__)
    parser.add_argument("--jobs", type=int, default=4_000, help="of each contestant, a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="of ours")
    parser.add_argument("--only", default="", help="what has this text in its name")
    return parser


def _send(app: Celery, task: str, number: int) -> None:
    for _ in range(number):
        app.send_task(task, kwargs=BODY)


@contextmanager
def _plain_worker(pool: str, broker: str, database: str) -> Iterator[psutil.Process]:
    command = [
        *(sys.executable, "-m", "celery", "-A", "app.bench.plain_celery", "worker"),
        *("--pool", pool, "--concurrency", str(POOLS[pool]), "--loglevel", "WARNING"),
    ]
    url = psycopg.conninfo.make_conninfo(database, dbname="plain")
    given = os.environ | {"PLAIN_BROKER": broker, "PLAIN_DATABASE": url}
    with subprocess.Popen(command, env=given, stderr=subprocess.DEVNULL) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.terminate()


def _wait(connection: psycopg.Connection[Any], ask: Any, *given: int) -> None:
    def answer() -> Any:
        return (connection.execute(ask, given).fetchone() or (False,))[0]

    eventually(answer, TIMEOUT_S, POLL_S)


def _heat(
    number: int,
    roots: Seq[tuple[str, psutil.Process]],
    submit: Callable[[], object],
    wait: Callable[[], object],
) -> Heat:
    before, began = _cpu_s(roots), time.monotonic()
    submit()
    answered_s = time.monotonic() - began
    wait()
    seconds, after = time.monotonic() - began, _cpu_s(roots)
    used = {part: spent - before.get(part, 0.0) for part, spent in after.items()}
    return Heat(number, answered_s, seconds, used)


def _cpu_s(roots: Seq[tuple[str, psutil.Process]]) -> dict[str, float]:
    """By part, with all its children, those that have ended included."""
    times = psutil.Process().cpu_times()
    used = {"producer": times.user + times.system}
    for name, root in roots:
        used[name] = used.get(name, 0.0) + _family_s(root)
    return used


def _family_s(root: psutil.Process) -> float:
    spent = 0.0
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        spent += times.user + times.system + times.children_user + times.children_system
    return spent


def _print(number: int, heats: dict[str, list[Heat]], answered_s: list[float]) -> None:
    parts = ["producer", "api", "worker", "redis", "postgres", "rescue"]
    rows = []
    for name, all_of in heats.items():
        rates = [heat.rate for heat in all_of]
        cpu = [median(heat.cpu_ms(part) for heat in all_of) for part in parts]
        rows.append(
            [
                name,
                f"{median(rates):.0f}",
                spread(rates),
                *(f"{each:.2f}" for each in cpu),
            ]
        )
    print(f"\n{machine()}")
    if rows:
        print(f"{number} jobs each; CPU in ms a job\n")
        print_table(["contestant", "jobs/s", "spread", *parts], rows)
    rate = {name: median(heat.rate for heat in all_of) for name, all_of in heats.items()}
    best = max((rate[name] for name in rate if name.startswith("plain")), default=None)
    ratios: dict[str, Any] = {}
    if best:
        ours = {name: each for name, each in rate.items() if not name.startswith("plain")}
        ratios = {
            "vs_plain_celery": round(ours.get("HTTP bulk", 0.0) / best, 3),
            "by_contestant": {name: round(each / best, 3) for name, each in ours.items()},
        }
    worker = {
        name: round(median(heat.cpu_ms("worker") for heat in all_of), 3)
        for name, all_of in heats.items()
    }
    answered: dict[str, Any] = {}
    if answered_s:
        print(f"\n{ANSWERED}: {median(answered_s):.2f} s ({spread(answered_s, 2)})")
        answered = {
            "jobs": LARGEST,
            "median": round(median(answered_s), 3),
            "spread": [round(min(answered_s), 3), round(max(answered_s), 3)],
        }
    print()
    print_json("jobs", ratios, jobs=number, worker_cpu_ms=worker, bulk_answered_s=answered)
