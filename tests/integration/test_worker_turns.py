"""Queues of one worker take turns, so that no model waits behind another's backlog."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import redis

from app.config.settings import ModelSettings, Settings
from tests.pushed import push
from tests.waiting import eventually
from tests.workers import rows, running_worker


def stub(**given: object) -> ModelSettings:
    return ModelSettings.model_validate(
        {"source": "stub", "kind": "generate", "engine": "stub", "max_batch_size": 2, **given}
    )


def test_jobs_of_an_idle_model_and_of_plain_send_task_do_not_wait_behind_a_backlog(
    make_settings: Callable[..., Settings], database_url: str, redis_url: str, tmp_path: Path
) -> None:
    settings = make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        models={"busy": stub(default=True), "idle": stub()},
    )
    with running_worker(settings, tmp_path / "worker"), redis.Redis.from_url(redis_url) as client:
        backlog = push(client, "gristmill.busy", "busy", 200)
        eventually(lambda: rows(settings, "SELECT 1 FROM results"), 30)

        idle = push(client, "gristmill.idle", "idle", 2)
        plain = push(client, "celery", "busy", 2)
        query = "SELECT 1 FROM jobs WHERE state = 'completed' AND id::text = ANY(%s)"
        eventually(lambda: len(rows(settings, query, idle + plain)) == 4, 30)

        left = client.llen("gristmill.busy")
        assert left > len(backlog) * 0.6, f"only {left} of the backlog were left by then"


def test_a_worker_holds_no_more_of_one_model_than_two_batches(
    make_settings: Callable[..., Settings], database_url: str, redis_url: str, tmp_path: Path
) -> None:
    settings = make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        models={"busy": stub(default=True), "idle": stub(max_batch_size=16)},
    )
    with running_worker(settings, tmp_path / "worker"), redis.Redis.from_url(redis_url) as client:
        push(client, "gristmill.busy", "busy", 60)
        most = 0
        while client.llen("gristmill.busy"):
            most = max(most, client.hlen("unacked"))

        assert 2 <= most <= 4


def test_jobs_of_an_idle_model_do_not_wait_behind_a_flood_of_plain_send_task_for_another(
    make_settings: Callable[..., Settings], database_url: str, redis_url: str, tmp_path: Path
) -> None:
    settings = make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        models={"busy": stub(default=True), "idle": stub()},
    )
    with running_worker(settings, tmp_path / "worker"), redis.Redis.from_url(redis_url) as client:
        flood = push(client, "celery", "busy", 400)
        plain = push(client, "celery", "idle", 2)
        own = push(client, "gristmill.idle", "idle", 2)

        query = "SELECT 1 FROM jobs WHERE state = 'completed' AND id::text = ANY(%s)"
        eventually(lambda: len(rows(settings, query, plain + own)) == 4, 60)

        assert len(rows(settings, query, flood)) < len(flood) * 0.9
