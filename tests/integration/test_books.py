"""The books of a whole system balance: jobs of all kinds, on real workers of which one is killed.

`make audit` plays 10,000 jobs, the suite a few hundred.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from app.config.settings import ModelSettings, Settings
from app.jobs import Kind
from app.store import cancellation
from app.store.audit import Audit, audit
from app.store.database import Database
from app.store.submissions import NewJob
from tests.rescues import running_rescue
from tests.rows import insert, new_job
from tests.unit.tiny_models import save_llama
from tests.waiting import eventually
from tests.workers import Worker

JOBS = int(os.environ.get("AUDIT_JOBS", "300"))
SECONDS = 60 + JOBS / 10
"""Until all have ended, on a busy machine."""
PIECE = 250
MODELS = ("joins", "static")
REAL = JOBS >= 1_000
"""Whether one job in ten is for real weights, and some of these give way to others. It is `make
audit` alone that takes the time: each engine process loads torch."""


def stub(**given: Any) -> ModelSettings:
    return ModelSettings(
        source="stub", kind=Kind.GENERATE, engine="stub", max_batch_size=16, max_wait_ms=20, **given
    )


def real(folder: Path) -> ModelSettings:
    """A cache for a few of its rows: others give way, and are computed again."""
    return ModelSettings(
        source=str(save_llama(folder / "llama")),
        kind=Kind.GENERATE,
        engine="inflight",
        max_batch_size=8,
        options={"cache_tokens": 5 * 32},
    )


@pytest.fixture
def config(
    make_settings: Callable[..., Settings], database_url: str, redis_url: str, tmp_path: Path
) -> Settings:
    return make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        worker={"lease_s": 3, "heartbeat_s": 0.5, "grace_s": 0.5, "step_timeout_s": 10},
        rescue={"sweep_ms": 100, "lost_after_s": 2},
        models={
            "joins": stub(options={"joins": True, "step_ms": 1}, default=True),
            "static": stub(options={"step_ms": 1}),
            **({"real": real(tmp_path)} if REAL else {}),
        },
    )


class Mill:
    """A system with two workers, and its store."""

    def __init__(self, config: Settings, folder: Path, stack: ExitStack) -> None:
        self.database = stack.enter_context(closing(Database(config.database.url)))
        stack.enter_context(running_rescue(config, folder / "rescue"))
        self._config, self._folder, self._stack = config, folder, stack
        self._workers: list[Worker] = []

    def start_worker(self) -> None:
        worker = Worker(self._config, self._folder / f"worker-{len(self._workers)}")
        self._stack.callback(worker.kill)
        self._workers.append(worker.start())

    def kill_worker(self) -> None:
        """With its engine process and all that both know, which is something."""
        worker = self._workers[-1]
        running = f"""SELECT count(*) FROM open_jobs JOIN workers ON workers.id = worker_id
            WHERE state = 'running' AND pid = {worker.pid}"""

        def is_stopped_at_work() -> bool:
            worker.send_signal(signal.SIGSTOP)
            if self.count(running):
                return True
            worker.send_signal(signal.SIGCONT)
            return False

        eventually(is_stopped_at_work)
        worker.kill()

    def drain_worker(self) -> None:
        """Its time is too short for what it runs, which is given back."""
        self._workers[-1].send_signal(signal.SIGTERM)

    def end(self) -> None:
        for worker in self._workers:
            if not worker.has_ended:
                worker.send_signal(signal.SIGTERM)
        for worker in self._workers:
            worker.wait(60)

    def ended(self) -> int:
        return int(self.count("SELECT count(*) FROM results"))

    def count(self, query: str) -> Any:
        with self.database.begin() as connection:
            return connection.scalar(text(query))

    def cancel(self, ids: list[UUID]) -> None:
        with self.database.begin() as connection:
            cancellation.cancel_free(connection, ids)

    def audit(self) -> Audit:
        with self.database.begin() as connection:
            return audit(connection, None, None)


@pytest.fixture
def mill(config: Settings, tmp_path: Path) -> Iterator[Mill]:
    with ExitStack() as stack:
        yield Mill(config, tmp_path, stack)


def a_job(chance: Random, number: int) -> NewJob:
    """One of all kinds; of those that are trouble for an engine, one in some hundreds."""
    model, sequences = chance.choice(MODELS), chance.choice([1, 1, 1, 1, 2, 3])
    verb = chance.choice(["", "", "", "", "", "sleep 20", "nan"])
    max_tokens = chance.randint(1, 24)
    if REAL and number % 10 == 7:
        model, verb, max_tokens = "real", "", max_tokens + 24
    elif number % 300 == 150:
        verb = "crash"
    elif number % 60 == 30:
        verb = "oom above 2"
    elif number % 75 == 20:
        verb, sequences = "oom above 1", 2  # it never fits
    late = chance.random() < 0.05
    return new_job(
        id=uuid4(),
        model=model,
        request={
            "prompt": f"job {number}\n{verb}",
            "model": model,
            "max_tokens": max_tokens,
            **({"n": sequences} if sequences > 1 else {}),
            **({"ignore_eos": True} if model == "real" else {}),
        },
        priority=chance.randint(0, 9),
        deadline=datetime.now(UTC) + timedelta(seconds=chance.uniform(0.5, 4)) if late else None,
        time_limit_s=60,
    )


@pytest.mark.slow
@pytest.mark.timeout(30 + 2 * SECONDS)
def test_the_books_balance_after_jobs_of_all_kinds_on_workers_that_come_and_go(mill: Mill) -> None:
    chance = Random(JOBS)
    mill.start_worker()
    mill.start_worker()
    ids: list[UUID] = []
    for begin in range(0, JOBS, PIECE):
        numbers = range(begin, min(begin + PIECE, JOBS))
        ids += insert(mill.database, *(a_job(chance, number) for number in numbers))

    doomed = chance.sample(ids, JOBS // 20)

    # while they run some are cancelled, one worker is killed and one told to end, without the time
    # for it; the books balance at any moment
    for part, event in ((0.3, mill.kill_worker), (0.6, mill.drain_worker)):

        def is_so(part: float = part) -> bool:
            mill.cancel([doomed.pop() for _ in range(min(3, len(doomed)))])
            return mill.ended() >= part * JOBS

        eventually(is_so, SECONDS)
        assert mill.audit().differences == []
        event()
        mill.start_worker()
    eventually(lambda: mill.ended() == JOBS, SECONDS)
    assert mill.audit().differences == []

    # and when all have ended, and the workers too
    mill.end()
    found = mill.audit()
    assert found.differences == []
    [sums] = found.sums
    assert sums.ns["stray"] == 0
    outcomes = Counter(dict(_pairs(mill, "SELECT outcome, count(*) FROM attempts GROUP BY 1")))
    states = dict(_pairs(mill, "SELECT state, count(*) FROM results GROUP BY 1"))
    preemptions = int(mill.count("SELECT coalesce(sum(preemptions), 0) FROM results"))
    assert outcomes["lost"] and states["completed"] > JOBS / 2
    assert preemptions > 0 or not REAL
    told = {"jobs": JOBS, "states": states, "attempts": outcomes, "windows": sums.num_windows}
    told |= {
        "preemptions": preemptions,
        "ns": sums.ns,
        "outside": sum(each.num_attempts for each in found.outside),
    }
    told |= {"difference_nano": found.difference_nano}
    print(json.dumps({"bench": "audit", **told}))  # noqa: T201


def _pairs(mill: Mill, query: str) -> list[tuple[str, int]]:
    with mill.database.begin() as connection:
        return [(row[0], row[1]) for row in connection.execute(text(query))]


def test_a_device_without_a_price_runs_says_so_and_its_jobs_have_no_cost(
    make_settings: Callable[..., Settings], database_url: str, redis_url: str, tmp_path: Path
) -> None:
    config = make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        worker={"price": "", "heartbeat_s": 0.5},
        models={"joins": stub(options={"joins": True}, default=True)},
    )
    with ExitStack() as stack:
        mill = Mill(config, tmp_path, stack)
        mill.start_worker()
        insert(mill.database, new_job(model="joins"))
        eventually(lambda: mill.ended() == 1, SECONDS)
        mill.end()

        found = mill.audit()
        assert found.differences == []
        assert [(each.currency, each.nano) for each in found.sums] == [(None, None)]
        assert found.sums[0].ns["busy"] > 0
        row = "SELECT coalesce(CAST(cost AS text), price_id, 'none') FROM results"
        assert mill.count(row) == "none"
        assert "The device has no price" in (tmp_path / "worker-0" / "worker.log").read_text()
