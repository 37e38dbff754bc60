"""Jobs whose model is at a server elsewhere: run, priced, and none lost when something dies."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery import Celery

from app.config.settings import Settings
from app.worker.engine.host import LAUNCH
from tests.fake_upstream import Does, FakeUpstream
from tests.waiting import eventually
from tests.workers import Worker, results, running_worker

JOBS = 200


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    def plan(number: int, body: dict[str, Any]) -> Does:
        return Does(429, ("Retry-After: 0.05",)) if number % 17 == 3 else Does()

    with FakeUpstream(plan) as upstream:
        yield upstream


@pytest.fixture
def config(
    make_settings: Callable[..., Settings],
    database_url: str,
    redis_url: str,
    upstream: FakeUpstream,
) -> Settings:
    return make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        worker={"lease_s": 5, "heartbeat_s": 1},
        prices={
            "cpu": {"per_device_hour": "0.08", "currency": "USD"},
            "tokens": {
                "per_device_hour": "0",
                "per_million_input_tokens": "0.15",
                "per_million_output_tokens": "0.6",
                "currency": "EUR",
            },
        },
        models={
            "elsewhere": {
                "source": "upstream",
                "kind": "generate",
                "engine": "openai",
                "default": True,
                "price": "tokens",
                "context_tokens": 4096,
                "max_batch_size": 32,
                "max_batch_tokens": 1_000_000,
                "options": {"model": "theirs", "url": upstream.url},
            }
        },
    )


def test_two_hundred_jobs_survive_the_death_of_their_server_and_of_their_engine(
    config: Settings, producer: Celery, upstream: FakeUpstream, tmp_path: Path
) -> None:
    # given jobs at a server that refuses some of them at first
    with running_worker(config, tmp_path / "worker") as worker:
        ids = {
            str(
                producer.send_task(
                    "inference.generate", kwargs={"prompt": f"say word{n}", "max_tokens": 4}
                ).id
            ): f"word{n}"
            for n in range(JOBS)
        }

        # when the server dies, and then the engine process
        eventually(lambda: upstream.seen.answered >= JOBS // 4)
        upstream.die()
        eventually(lambda: "An answer was lost" in worker.log or "cannot be reached" in worker.log)
        upstream.listen()
        eventually(lambda: upstream.seen.answered >= JOBS // 2)
        engine_of(worker).send_signal(signal.SIGKILL)
        found = eventually(lambda: (all_ := results(config)).keys() >= ids.keys() and all_, 60)

    # then each job has its own answer, and the charges add up to the price of all tokens
    for id_, word in ids.items():
        row = found[id_]
        assert (row["state"], row["currency"], row["price_id"]) == ("completed", "EUR", "tokens")
        assert row["response"]["choices"][0]["text"] == word
        assert (row["input_tokens"], row["output_tokens"], row["device_ns"]) == (2, 1, 0)
    exact = JOBS * (2 * Decimal("0.15") + Decimal("0.6")) / 1_000_000
    assert sum(found[id_]["cost"] for id_ in ids) == exact


def engine_of(worker: Worker) -> psutil.Process:
    [engine] = [
        child for child in psutil.Process(worker.pid).children() if str(LAUNCH) in child.cmdline()
    ]
    return engine
