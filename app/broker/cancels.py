"""News of cancels: each worker hears, on a channel of its own, which of its jobs were cancelled.

A channel keeps nothing, and news may be lost: the cancel itself is in the job's row, where the next
heartbeat finds it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any, Final
from uuid import UUID

import redis
from celery import Celery

from app.broker.refusal import as_unavailable
from app.errors import Unavailable
from app.jobs import job_ids_in

log = logging.getLogger(__name__)

CHANNELS: Final = "gristmill.cancels.*"
"""Those of all workers, for rights."""

PING_S: Final = 5.0
"""A server that has been silent for so long is asked for a word, and is away without one."""
POLL_S: Final = 1.0
"""Pause between looks while the server is away."""
LOOKS_AWAY: Final = 5
"""Looks before the next try to connect: one that stands still keeps what is left of each."""


def channel_of(worker_id: UUID) -> str:
    """Without `broker.key_prefix`."""
    return CHANNELS.replace("*", str(worker_id))


def hear(
    app: Celery, worker_id: UUID, prefix: str, stop: threading.Event
) -> Iterator[frozenset[UUID] | None]:
    """Running jobs of this worker as they are cancelled, till `stop` is set, over one connection.

    Reconnects by itself. None says that some may have been missed, so that the rows are to be
    looked at: after every connect, and every `POLL_S` while there is no connection. Ends within
    about `PING_S` of `stop`.
    """
    is_told = False
    while not stop.is_set():
        try:
            with as_unavailable(), app.connection_for_read() as connection:
                client: redis.Redis = connection.default_channel.plain
                with client.pubsub() as subscription:  # type: ignore[no-untyped-call]
                    subscription.subscribe(prefix + channel_of(worker_id))
                    for job_ids in _heard(subscription, stop):
                        is_told = False
                        yield job_ids
        except Unavailable as error:
            if not is_told:
                log.warning("No news of cancels: %s", error, extra={"action": "news_away"})
            is_told = True
            for _ in range(LOOKS_AWAY):
                yield None
                if stop.wait(POLL_S):
                    return


def _heard(subscription: Any, stop: threading.Event) -> Iterator[frozenset[UUID] | None]:
    """What a subscription brings. Raises what redis-py raises, and `redis.TimeoutError` if the
    server falls silent, which the system would notice after minutes."""
    heard_s, is_asked = time.monotonic(), False
    while not stop.is_set():
        message = subscription.get_message(timeout=PING_S)
        silent_s = time.monotonic() - heard_s
        if message is not None:
            heard_s, is_asked = time.monotonic(), False
            if message["type"] == "subscribe":  # redis-py may also have connected anew by itself
                yield None
            elif message["type"] == "message":
                yield job_ids_in(message["data"].decode("ascii", "replace"))
        elif is_asked and silent_s > 1.5 * PING_S:
            raise redis.TimeoutError
        elif not is_asked:
            subscription.ping()
            is_asked = True
