"""The proxy of the chaos tests does to real sockets what it says."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from app.local.ports import free_port
from tests.chaos.proxy import HELD, LOST, Flow, Proxy
from tests.waiting import eventually


class Echo:
    """A server that sends back what it gets, and remembers it."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.resets = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was shut down
            while True:
                connection, _ = self._listener.accept()
                thread = threading.Thread(target=self._echo, args=[connection])
                self._threads.append(thread)
                thread.start()

    def _echo(self, connection: socket.socket) -> None:
        with connection:
            try:
                while piece := connection.recv(65_536):
                    self.received += piece
                    connection.sendall(piece)
            except ConnectionError:
                self.resets += 1

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy(echo.port) as proxy:
        yield proxy


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=20)


def read(client: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (piece := client.recv(65_536)):
        found += piece
    return found


def talks(client: socket.socket, text: bytes = b"hello") -> bool:
    client.sendall(text)
    return read(client, len(text)) == text


def talk_for_ever(client: socket.socket) -> None:
    while talks(client):
        time.sleep(0.01)


def hears_nothing(client: socket.socket) -> bool:
    client.settimeout(0.2)
    try:
        return not client.recv(1)
    except TimeoutError:
        return True
    finally:
        client.settimeout(20)


def test_megabytes_pass_in_order_and_the_end_of_one_side_reaches_the_other(proxy: Proxy) -> None:
    content = bytes(range(256)) * 20_000
    with connect(proxy) as client:
        sender = threading.Thread(
            target=lambda: (client.sendall(content), client.shutdown(socket.SHUT_WR))
        )
        sender.start()
        assert read(client, len(content)) == content
        sender.join()
        assert client.recv(1) == b""
    eventually(lambda: proxy.counts.open == 0)
    assert proxy.counts.accepted == 1
    assert proxy.counts.to_server_bytes == proxy.counts.to_client_bytes == len(content)


def test_a_delay_and_a_drip_take_at_least_their_time(proxy: Proxy) -> None:
    with connect(proxy) as client:
        proxy.flow(to_server=Flow(delay_s=0.1), to_client=Flow(delay_s=0.1))
        began = time.monotonic()
        assert talks(client)
        assert time.monotonic() - began >= 0.2

        proxy.flow(to_client=Flow(bytes_per_s=100))
        began = time.monotonic()
        assert talks(client, b"x" * 30)
        assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize("way", ["to_server", "to_client"])
def test_what_is_held_comes_after_healing_and_the_other_way_is_open(
    proxy: Proxy, echo: Echo, way: str
) -> None:
    with connect(proxy) as client:
        proxy.flow(**{way: HELD})
        client.sendall(b"late")
        assert hears_nothing(client)
        assert bytes(echo.received) == (b"" if way == "to_server" else b"late")

        proxy.heal()

        assert read(client, 4) == b"late"
        assert talks(client)


def test_held_bytes_of_a_client_that_is_gone_still_reach_the_server(
    proxy: Proxy, echo: Echo
) -> None:
    proxy.flow(to_server=HELD)
    with connect(proxy) as client:
        client.sendall(b"last words")
    eventually(lambda: proxy.counts.open == 1)
    assert not echo.received

    proxy.heal()

    eventually(lambda: bytes(echo.received) == b"last words")
    eventually(lambda: proxy.counts.open == 0)


def test_what_is_lost_never_comes_and_healing_resets_the_connection(
    proxy: Proxy, echo: Echo
) -> None:
    with connect(proxy) as client, connect(proxy) as other:
        assert talks(other)
        proxy.flow(to_server=LOST)
        client.sendall(b"into the void")
        assert hears_nothing(client)

        proxy.heal()

        with pytest.raises(ConnectionResetError):
            client.recv(1)
        assert talks(other)
    assert b"void" not in echo.received
    with connect(proxy) as client:
        assert talks(client)


def test_a_reset_reaches_both_sides_even_while_bytes_are_held(proxy: Proxy, echo: Echo) -> None:
    with connect(proxy) as client:
        assert talks(client)
        proxy.flow(to_server=HELD)
        client.sendall(b"x")
        assert proxy.reset() == 1
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    eventually(lambda: echo.resets == 1)
    assert proxy.counts.reset == 1
    assert proxy.counts.open == 0


def test_a_reset_of_the_server_reaches_the_client(proxy: Proxy) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, Proxy(listener.getsockname()[1]) as proxy, connect(proxy) as client:
        served, _ = listener.accept()
        client.sendall(b"never read")
        eventually(lambda: proxy.counts.to_server_bytes == 10)
        served.close()  # with bytes unread, so the kernel resets
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_a_storm_resets_again_and_again_until_healing(proxy: Proxy) -> None:
    proxy.reset_every(0.05)
    for _ in range(3):
        with connect(proxy) as client, pytest.raises(ConnectionError):
            talk_for_ever(client)
    proxy.heal()
    with connect(proxy) as client:
        began = time.monotonic()
        while time.monotonic() - began < 0.2:
            assert talks(client)


def test_it_refuses_and_listens_again_on_the_same_port(proxy: Proxy) -> None:
    with connect(proxy) as client:
        assert talks(client)
        proxy.refuse()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    assert free_port(proxy.port) != proxy.port  # nobody else gets it

    proxy.heal()

    with connect(proxy) as client:
        assert talks(client)


def test_a_server_that_is_away_resets_its_clients(echo: Echo) -> None:
    with Proxy(free_port()) as proxy:
        with pytest.raises(ConnectionResetError), connect(proxy) as client:
            client.recv(1)
        assert proxy.counts.accepted == 1
