"""Connections: how many there may be, and how long the head of a request may take.

Uvicorn closes a kept connection that is idle. It waits for ever for one that sends its first
request byte by byte, or nothing at all: a few thousand of those, and nobody else gets in.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Final

import h11
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.errors import ConfigError

HEAD_TIMEOUT_S: Final = 10.0
"""For the head of a request, from the connection or from its first byte. Bodies have their own."""

_BODY: Final = (
    b'{"type":"urn:gristmill:problem:too_many_connections","title":"Too many connections",'
    b'"status":503,"detail":"All connections of this API are taken. Try again.",'
    b'"code":"too_many_connections"}'
)
BUSY: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Type: application/problem+json\r\nContent-Length: %d\r\n\r\n%b"
) % (len(_BODY), _BODY)
"""What is answered beyond the limit, before any request is read."""


SPARE_FILES: Final = 96
"""What the process has open besides: to Postgres, Redis and its log, and libraries."""


def allow(number: int) -> None:
    """Let this process have so many connections: each is a file to the system.

    Raises `ConfigError` if the system's hard limit is lower.
    """
    needed = number + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise ConfigError(
            f"api.max_connections is {number}, but this process may open only {hard} files: lower "
            f"it to {max(1, hard - SPARE_FILES)}, or raise the limit (ulimit -Hn)."
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class Connection(H11Protocol):
    """Uvicorn's own, within limits."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        app = self.config.app
        assert isinstance(app, FastAPI)
        is_full = len(self.connections) > app.state.services.settings.api.max_connections
        if is_full and not self._take_idle_place():
            transport.write(BUSY)
            transport.close()
        else:
            self._watch_head()

    def _take_idle_place(self) -> bool:
        """Close the connection that has asked for nothing for the longest, if there is one.

        Clients that keep connections open for later do not keep others out.
        """
        oldest = next(iter(self._idle), None)
        if oldest is None:
            return False
        del self._idle[oldest]
        self.connections.discard(oldest)
        oldest.timeout_keep_alive_handler()
        return True

    @property
    def _idle(self) -> dict[Connection, None]:
        """Those between two requests, of the whole server, the longest idle first."""
        idle: dict[Connection, None] = self.config.app.state.idle_connections  # type: ignore[union-attr]
        return idle

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._idle[self] = None

    def data_received(self, data: bytes) -> None:
        self._idle.pop(self, None)
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._idle.pop(self, None)
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        """The timer runs for as long as a request has begun, or must, and its head is not here."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
