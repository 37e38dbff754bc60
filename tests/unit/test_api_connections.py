"""Connections: a file each, or a clear refusal at the start; accepted a few at a time."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from types import SimpleNamespace
from typing import cast

import pytest

from app.api.app import (
    ACCEPTED_A_TURN,
    SYSTEM_BUFFER_BYTES,
    Server,
    create_app,
    listen_on,
)
from app.api.wire import connections
from app.api.wire.connections import PIECE_BYTES, SPARE_FILES, HeadsHeld
from app.config.settings import Settings
from app.errors import ConfigError
from gristmill_client.exchange import LIMITS
from gristmill_client.timer import HOLD_S


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The soft and the hard limit on open files."""
    now = [1_024, 4_096]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(now))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, new: now.__setitem__(slice(None), new))
    return now


def test_the_soft_limit_is_raised_to_what_is_needed(limits: list[int]) -> None:
    connections.allow(4_000)

    assert limits == [4_000 + SPARE_FILES, 4_096]


def test_a_soft_limit_that_is_high_enough_is_left_alone(limits: list[int]) -> None:
    connections.allow(500)

    assert limits == [1_024, 4_096]


def test_more_connections_than_the_hard_limit_allows_are_refused(limits: list[int]) -> None:
    with pytest.raises(ConfigError, match="lower it to 4000"):
        connections.allow(10_000)
    assert limits == [1_024, 4_096]


def test_those_who_come_at_once_are_accepted_a_few_in_each_turn_of_the_loop(
    make_settings: Callable[..., Settings],
) -> None:
    settings = make_settings(
        database={"url": "postgresql://nobody@127.0.0.1:1/none"},
        broker={"url": "redis://127.0.0.1:1/0"},
    )
    num, accepted = 40, [0]

    async def watch() -> None:
        with ExitStack() as open_ones:
            sock = listen_on("127.0.0.1", 0)
            server = Server(create_app(settings))
            server.config.load()
            server.lifespan = server.config.lifespan_class(server.config)
            await server.startup([sock])
            for _ in range(num):  # the system takes them all
                client = socket.create_connection(sock.getsockname(), timeout=10)
                open_ones.enter_context(client)
            async with asyncio.timeout(30):
                while accepted[-1] < num:
                    await asyncio.sleep(0)
                    accepted.append(len(server.server_state.connections))
            await server.shutdown([sock])

    asyncio.run(watch())

    steps = [now - before for before, now in pairwise(accepted)]
    assert 0 < max(steps) <= ACCEPTED_A_TURN


def test_connections_are_kept_for_longer_than_the_client_keeps_them(
    make_settings: Callable[..., Settings],
) -> None:
    settings = make_settings(
        database={"url": "postgresql://nobody@127.0.0.1:1/none"},
        broker={"url": "redis://127.0.0.1:1/0"},
    )
    kept_s = LIMITS.keepalive_expiry

    assert kept_s is not None
    assert kept_s < Server(create_app(settings)).config.timeout_keep_alive
    assert kept_s > HOLD_S  # from one look at a job to the next


def test_what_the_system_holds_of_each_connection_is_bounded() -> None:
    with (
        listen_on("127.0.0.1", 0) as sock,
        socket.create_connection(sock.getsockname(), timeout=10),
        sock.accept()[0] as accepted,
    ):
        for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):  # Linux says twice what it was told
            assert accepted.getsockopt(socket.SOL_SOCKET, buffer) <= 2 * SYSTEM_BUFFER_BYTES


def test_the_head_of_an_answer_and_its_body_are_one_write() -> None:
    loop = asyncio.new_event_loop()
    sent = list[bytes]()
    real = SimpleNamespace(write=sent.append, close=lambda: sent.append(b"closed"))
    held = HeadsHeld(cast("asyncio.Transport", real), loop)

    # when a body follows
    held.write(b"HTTP/1.1 200 OK\r\n\r\n")
    held.write(b"{}")
    held.write(b"")  # the end, as h11 spells it
    assert sent == [b"HTTP/1.1 200 OK\r\n\r\n{}"]

    # when a long one follows, which is not copied
    sent.clear()
    long = bytes(PIECE_BYTES + 1)
    held.write(b"HTTP/1.1 200 OK\r\n\r\n")
    held.write(long)
    assert sent[0] == b"HTTP/1.1 200 OK\r\n\r\n" and sent[1] is long
    sent.clear()

    # when it takes its time, as that of a stream
    held.write(b"HTTP/1.1 200 OK\r\n\r\n")
    loop.run_until_complete(asyncio.sleep(0))
    held.write(b"data: 1\n\n")
    held.write(b"data: 2\n\n")
    assert sent == [b"HTTP/1.1 200 OK\r\n\r\n", b"data: 1\n\n", b"data: 2\n\n"]

    # when none comes
    held.write(b"HTTP/1.1 304 Not Modified\r\n\r\n")
    held.close()
    assert sent[3:] == [b"HTTP/1.1 304 Not Modified\r\n\r\n", b"closed"]
    loop.close()
