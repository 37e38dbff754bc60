"""Clients in other languages are answered as Python's own is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import redis

from app.config.settings import Settings
from tests.foreign_messages import ETA, EXPIRES, FOREIGN, item
from tests.waiting import eventually
from tests.workers import rows, running_worker


def test_every_client_is_answered_and_its_times_are_kept(
    make_settings: Callable[..., Settings], database_url: str, redis_url: str, tmp_path: Path
) -> None:
    # given a message of each client in the queue that they all use when none is named
    config = make_settings(database={"url": database_url}, broker={"url": redis_url})
    sent = {name: str(uuid4()) for name in FOREIGN}
    with redis.Redis.from_url(redis_url) as client:
        for name, task_id in sent.items():
            client.lpush("celery", item(FOREIGN[name], task_id, {"prompt": "flour"}))

        # when a worker takes them
        with running_worker(config, tmp_path / "worker"):

            def states() -> dict[str, str]:
                return {
                    str(row["id"]): row["state"]
                    for row in rows(config, "SELECT id, state FROM jobs")
                }

            timed = {task_id for name, task_id in sent.items() if FOREIGN[name].has_times}
            plain = set(sent.values()) - timed
            found = eventually(
                lambda: (
                    len(all_ := states()) == len(sent)
                    and {all_[id_] for id_ in plain} == {"completed"}
                    and all_
                ),
                60,
            )

            # then those with a time wait for it, and nothing is left unacknowledged
            assert {found[id_] for id_ in timed} == {"queued"}
            eventually(lambda: client.hlen("unacked") == 0)
    for row in rows(config, "SELECT id, not_before, deadline FROM jobs WHERE state = 'queued'"):
        assert str(row["id"]) in timed
        assert (row["not_before"], row["deadline"]) == (ETA, EXPIRES)
