"""A broker behind Sentinel: it is found, and found again when the master is another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from app.broker.client import connected
from app.broker.commands import ready_workers
from app.broker.message import Message
from app.broker.publisher import Publisher
from app.config.settings import Settings
from app.errors import Unavailable
from app.jobs import Kind
from tests.sentinels import MASTER, PASSWORD, watched_redis
from tests.waiting import eventually
from tests.workers import results, running_worker


def test_a_failover_under_load_ends_nobody_and_both_sides_go_to_the_new_master(
    make_settings: Callable[..., Settings], database_url: str, tmp_path: Path
) -> None:
    with watched_redis(tmp_path / "redis") as servers:
        settings = make_settings(
            database={"url": database_url},
            broker={
                "url": servers.url,
                "sentinel_master": MASTER,
                "sentinel_password": PASSWORD,
            },
        )
        publisher = Publisher(settings)
        sent: list[str] = []

        def send() -> bool:
            message = Message(uuid4(), Kind.GENERATE, "stub", {"prompt": "x"}, "/v1/completions")
            try:
                publisher.send(message)
            except Unavailable:
                return False
            sent.append(str(message.job_id))
            return True

        with running_worker(settings, tmp_path / "worker") as worker:
            before = servers.master
            assert send()
            eventually(lambda: sent[0] in results(settings), 30)

            servers.kill(before)
            eventually(lambda: send() and servers.master != before, 30)
            last = eventually(lambda: send() and sent[-1], 30)

            eventually(lambda: last in results(settings), 60)
            eventually(lambda: ready_workers(settings), 30)
            assert not worker.has_ended
            with connected(settings) as client:
                assert client.connection_pool.get_connection().port == servers.master
        publisher.close()
