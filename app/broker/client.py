"""A plain Redis client where `broker.url` leads, for looking around."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import redis

from app.broker.app import make_app
from app.broker.refusal import as_unavailable
from app.config.settings import Settings


@contextmanager
def connected(settings: Settings, timeout_s: float = 3.0) -> Iterator[redis.Redis]:
    """The server, user and encryption of a worker; keys are whole. Raises `Unavailable`."""
    with make_app(settings) as app, as_unavailable():
        app.conf.broker_transport_options |= {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
        }
        with app.connection_for_write() as connection:
            yield redis.Redis(connection_pool=connection.default_channel.pool)
