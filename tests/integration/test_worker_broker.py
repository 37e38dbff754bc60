"""A worker whose Redis is in trouble goes on with what it has."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import redis

from app.broker.commands import ready_workers
from app.broker.message import raw_message
from app.config.settings import Settings
from app.jobs import Kind
from tests.own_redis import running_redis
from tests.waiting import eventually
from tests.workers import results, running_worker


def test_a_redis_that_is_full_does_not_end_the_worker_and_its_messages_are_answered(
    make_settings: Callable[..., Settings], database_url: str, tmp_path: Path
) -> None:
    with running_redis(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        settings = make_settings(database={"url": database_url}, broker={"url": server.url})
        with running_worker(settings, tmp_path / "worker") as worker:
            eventually(lambda: client.keys("_kombu.binding.*pidbox"))  # it has begun to consume
            worker.send_signal(signal.SIGSTOP)
            ids = [str(uuid4()) for _ in range(5)]
            for job_id in ids:
                item = raw_message(job_id, Kind.GENERATE, {"prompt": "x"}, queue="celery")
                client.lpush("celery", item)
            client.config_set("maxmemory", 1)
            worker.send_signal(signal.SIGCONT)

            found = eventually(lambda: (all_ := results(settings)).keys() >= set(ids) and all_, 60)

            assert {row["state"] for row in found.values()} == {"completed"}
            eventually(lambda: not client.hlen("unacked"))
            client.config_set("maxmemory", 0)
            last = str(uuid4())
            client.lpush(
                "celery", raw_message(last, Kind.GENERATE, {"prompt": "x"}, queue="celery")
            )
            eventually(lambda: last in results(settings), 60)
            assert "Unrecoverable error" not in worker.log


def test_a_worker_starts_on_a_redis_that_is_full_and_empties_it(
    make_settings: Callable[..., Settings], database_url: str, tmp_path: Path
) -> None:
    with running_redis(tmp_path) as server, redis.Redis.from_url(server.url) as client:
        settings = make_settings(database={"url": database_url}, broker={"url": server.url})
        ids = [str(uuid4()) for _ in range(5)]
        for job_id in ids:
            item = raw_message(job_id, Kind.GENERATE, {"prompt": "x"}, queue="celery")
            client.lpush("celery", item)
        client.config_set("maxmemory", 1)

        with running_worker(settings, tmp_path / "worker"):
            found = eventually(lambda: (all_ := results(settings)).keys() >= set(ids) and all_, 60)

            assert {row["state"] for row in found.values()} == {"completed"}
            client.config_set("maxmemory", 0)
            eventually(lambda: ready_workers(settings), 60)
