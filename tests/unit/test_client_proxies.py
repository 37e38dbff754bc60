"""Which way the client's requests go where the environment names a proxy."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from app.config.host import is_loopback
from gristmill_client import AsyncClient, Client
from gristmill_client.exchange import stays_here

JOB = json.dumps({"id": "1", "state": "queued"}).encode()


@dataclass
class Server:
    """The API and a proxy at once: a proxy is asked for whole URLs."""

    port: int
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            noted.asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(JOB)))
            self.end_headers()
            self.wfile.write(JOB)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        noted = Server(http.server_port)
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{noted.port}")
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield noted
        http.shutdown()
        thread.join()


def ask(base_url: str) -> None:
    async def ask_async() -> None:
        async with AsyncClient(base_url, patience_s=0) as client:
            await client.job("1")

    with Client(base_url, patience_s=0) as client:
        client.job("1")
    asyncio.run(ask_async())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_what_is_for_this_machine_is_never_sent_to_a_proxy(server: Server, host: str) -> None:
    ask(f"http://{host}:{server.port}")

    assert server.asked == ["/v1/jobs/1"] * 2


def test_what_is_for_another_machine_goes_by_the_proxy_of_the_environment(server: Server) -> None:
    ask("http://gristmill.internal:8000")

    assert server.asked == ["http://gristmill.internal:8000/v1/jobs/1"] * 2


@pytest.mark.parametrize(
    ("hosts", "is_private", "stays"),
    [
        (("127.0.0.1", "127.9.9.9", "::1", "localhost", "LocalHost.", "a.localhost"), True, True),
        (("0.0.0.0", "::"), False, True),
        (("10.0.0.1", "localhost.evil.example", "notlocalhost", ""), False, False),
    ],
)
def test_hosts_of_this_machine_are_known_by_their_names(
    hosts: tuple[str, ...], is_private: bool, stays: bool
) -> None:
    for host in hosts:
        assert (is_loopback(host), stays_here(host)) == (is_private, stays)
