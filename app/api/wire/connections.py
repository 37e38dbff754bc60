"""Connections: how many there may be, how long they may keep us waiting, what each may hold.

Uvicorn closes a kept connection that is idle. It waits for ever for one that sends its first
request byte by byte, or nothing at all, and for one that does not read its answer: a few thousand
of those, and nobody else gets in.

What a connection holds is the head of a request, one piece of its body that nobody has asked for
yet, and one answer. The rest is left to TCP, which holds the sender back.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any, Final

import h11
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.errors import ConfigError

HEAD_TIMEOUT_S: Final = 10.0
"""For the head of a request, from the connection or from its first byte, and for the rest of a body
that is answered already. Other bodies have their own."""

HEAD_BYTES: Final = 16_384
"""Taken off the wire at once while a head is awaited; one that has not ended then is refused."""

PIECE_BYTES: Final = 32_768
"""Taken off the wire at once of a body."""

WRITE_TIMEOUT_S: Final = 20.0
MIN_BYTES_PER_S: Final = 100_000
"""An answer may lie unread for so long, and longer if it is read at this rate."""

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


class Unread:
    """Owner of the answers that clients do not read, of the whole server; in bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max = max_bytes
        self._sizes: dict[Connection, int] = {}  #: who has not read for the longest comes first
        self.held = 0

    def add(self, connection: Connection, size: int) -> None:
        self._sizes[connection] = size
        self.held += size
        while self.held > self._max and len(self._sizes) > 1:
            self.remove(oldest := next(iter(self._sizes)))
            oldest.transport.abort()  # `close` would wait for ever

    def remove(self, connection: Connection) -> None:
        self.held -= self._sizes.pop(connection, 0)


class HeadsHeld:
    """A transport that sends the head of an answer and what follows it in the same turn of the loop
    together: one call of the system and one segment, where Uvicorn makes two of each."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if data.startswith(b"HTTP/") and not self._head:
            self._head = data
            self._loop.call_soon(self._send_head)
        elif data:
            if len(data) > PIECE_BYTES:  # a copy of it would cost more
                self._send_head()
            head, self._head = self._head, b""
            self._transport.write(head + data if head else data)

    def close(self) -> None:
        self._send_head()
        self._transport.close()

    def _send_head(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)


class Connection(H11Protocol):
    """Uvicorn's own, within limits."""

    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # whatever the system does not take is unread
        self._own = transport
        self.transport = HeadsHeld(transport, self.loop)  # type: ignore[assignment]
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

    def _unsupported_upgrade_warning(self) -> None:
        """Answered as if it had not asked, as HTTP has it. It is no news, and anybody may ask."""

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._idle[self] = None
        elif self.conn.their_state is h11.SEND_BODY:
            self._watch_head()

    # ── from the client ──────────────────────────────────────────────────────────────────────

    def data_received(self, data: bytes) -> None:
        self._idle.pop(self, None)
        super().data_received(data)
        if self.cycle is not None and self.cycle.body:
            self.flow.pause_reading()  # until the handler asks for more
        self._watch_head()

    def handle_events(self) -> None:
        """No further request is begun before the last answer is on its way."""
        if self.flow.write_paused:
            self.flow.pause_reading()
        else:
            super().handle_events()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._all_read()
        self._idle.pop(self, None)
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        """The timer runs while a request has begun, or must, and its head is not here; and while
        there is more of one that nobody handles any more."""
        is_answered = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        is_head = self.conn.their_state is h11.IDLE
        self._own.max_size = HEAD_BYTES if is_head else PIECE_BYTES  # type: ignore[attr-defined]
        if not is_head and not is_answered:
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    # ── to the client ────────────────────────────────────────────────────────────────────────

    def pause_writing(self) -> None:
        super().pause_writing()
        size = self.transport.get_write_buffer_size()
        timeout_s = WRITE_TIMEOUT_S + size / MIN_BYTES_PER_S
        self._write_timer = self.loop.call_later(timeout_s, self.transport.abort)
        self._unread.add(self, size)

    def resume_writing(self) -> None:
        self._all_read()
        super().resume_writing()
        if not self.transport.is_closing():
            self.flow.resume_reading()
            self.handle_events()

    def _all_read(self) -> None:
        self._unread.remove(self)
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    @property
    def _unread(self) -> Unread:
        unread: Unread = self.config.app.state.unread  # type: ignore[union-attr]
        return unread
