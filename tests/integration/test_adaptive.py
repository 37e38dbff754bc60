"""A real worker whose batches wait by the adaptive policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import redis

from app.config.settings import Settings
from tests.integration.test_worker_turns import stub
from tests.pushed import push
from tests.waiting import eventually
from tests.workers import results, running_worker


def test_lone_jobs_and_a_crowd_are_answered_long_before_max_wait(
    make_settings: Callable[..., Settings], database_url: str, redis_url: str, tmp_path: Path
) -> None:
    # given a model whose batches may wait for two minutes
    settings = make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        models={
            "busy": stub(
                default=True,
                max_batch_size=8,
                max_wait_ms=120_000,
                batch={"policy": "adaptive"},
                options={"step_ms": 2, "row_ms": 1},
            )
        },
    )
    with running_worker(settings, tmp_path / "worker"), redis.Redis.from_url(redis_url) as client:
        # when jobs come alone, and then many together
        for number in (1, 1, 20, 1):
            known = len(results(settings)) + number
            push(client, "gristmill.busy", "busy", number)

            # then none waits as it would with a fixed wait
            eventually(lambda known=known: len(results(settings)) == known, 30)
