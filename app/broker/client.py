"""A plain Redis client where `broker.url` leads, for looking around."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import redis

from app.broker.app import make_app
from app.broker.refusal import CLUSTER, IS_CLUSTER, as_unavailable
from app.config.settings import Settings
from app.errors import ConfigError, Unavailable


@contextmanager
def connected(settings: Settings, timeout_s: float = 3.0) -> Iterator[redis.Redis]:
    """The server, user and encryption of a worker; keys are whole. Raises `Unavailable`."""
    with make_app(settings) as app, as_unavailable():
        app.conf.broker_transport_options |= {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "max_retries": 0,
        }
        with app.connection_for_write() as connection:
            yield connection.default_channel.plain


def check_kind(settings: Settings) -> None:
    """Raise `ConfigError` if the server can be reached and is none that could ever serve."""
    prefix = settings.broker.key_prefix
    with suppress(Unavailable), connected(settings) as client:
        try:
            client.exists(f"{prefix}unacked", f"{prefix}unacked_index")  # in two slots
        except CLUSTER:
            raise ConfigError(f"broker.url: {IS_CLUSTER}") from None
