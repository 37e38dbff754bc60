"""Messages as a service pushes them straight into Redis."""

from __future__ import annotations

from uuid import uuid4

import redis

from app.broker.message import raw_message
from app.broker.queues import Layout
from app.jobs import Kind


def push(client: redis.Redis, queue: str, model: str, number: int, priority: int = 0) -> list[str]:
    """So many jobs, each of 50 ms on the stub; their ids."""
    ids = [str(uuid4()) for _ in range(number)]
    for job_id in ids:
        body = {"prompt": "x\nsleep 50", "model": model}
        item = raw_message(job_id, Kind.GENERATE, body, queue=queue, priority=priority)
        client.lpush(Layout().key(queue, priority), item)
    return ids
