"""Whether a part is well: it is, or it is alive, or it says nothing; a foreign server is not it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from app.broker import commands
from app.config.file import PROJECT, load
from app.config.settings import Settings
from app.errors import Unavailable
from app.local import checks
from app.local.upkeep import Answer

READY, BUSY = (200, b'{"status": "ready"}'), (503, b'{"status": "unavailable"}')
WELL = (200, b"ok\n")
HANGS = (0, b"")
Serve = Callable[[dict[str, tuple[int, bytes]]], Settings]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """A server that answers paths; the settings of an API and a Flower at its port."""
    monkeypatch.setattr(checks, "ANSWER_S", 0.3)
    stop, servers = threading.Event(), []

    def start(answers: dict[str, tuple[int, bytes]]) -> Settings:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = answers.get(self.path, (404, b"not here"))
                if not status:
                    stop.wait()
                    return
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = str(server.server_address[1])
        environ = {"GRISTMILL_API__PORT": port, "GRISTMILL_FLOWER__PORT": port}
        return load(PROJECT / "configs" / "default.toml", environ).settings

    yield start
    stop.set()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("readyz", "healthz", "expected"),
    [
        (READY, WELL, Answer.READY),
        (BUSY, WELL, Answer.ALIVE),
        (HANGS, WELL, Answer.ALIVE),  # Postgres hangs, not the API
        (HANGS, HANGS, Answer.SILENT),
        ((200, b"<html>welcome</html>"), (200, b"<html>welcome</html>"), Answer.SILENT),
        ((200, b"[]"), (404, b""), Answer.SILENT),
        ((200, b"1"), (404, b""), Answer.SILENT),
        ((404, b'{"detail": "Not Found"}'), (404, b""), Answer.SILENT),
    ],
)  # fmt: skip
def test_an_api_is_told_from_a_foreign_server_on_its_port_and_from_one_that_waits(
    serve: Serve, readyz: tuple[int, bytes], healthz: tuple[int, bytes], expected: Answer
):
    assert checks.api(serve({"/readyz": readyz, "/healthz": healthz})) is expected


def test_flower_is_told_from_a_foreign_server_on_its_port(serve: Serve):
    assert checks.flower(serve({"/healthcheck": (200, b"OK")})) is Answer.READY
    assert checks.flower(serve({"/healthcheck": (200, b"<html>")})) is Answer.SILENT
    assert checks.flower(serve({"/healthcheck": HANGS})) is Answer.SILENT


def test_a_worker_is_not_blamed_for_a_redis_that_is_away(monkeypatch: pytest.MonkeyPatch):
    settings = load(PROJECT / "configs" / "default.toml", {}).settings

    def fail(_: Settings) -> dict[str, bool]:
        raise Unavailable

    monkeypatch.setattr(commands, "workers", fail)

    assert checks.worker(settings) is None


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, Answer.SILENT),
        ({"gristmill-1@elsewhere": True}, Answer.SILENT),
        ({"gristmill-1@here": False}, Answer.ALIVE),
        ({"gristmill-1@here": False, "gristmill-2@here": True}, Answer.READY),
    ],
)
def test_a_worker_of_this_machine_is_asked(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, bool], expected: Answer
):
    settings = load(PROJECT / "configs" / "default.toml", {}).settings
    monkeypatch.setattr(commands, "workers", lambda _: found)
    monkeypatch.setattr("socket.gethostname", lambda: "here")

    assert checks.worker(settings) is expected


def test_a_rescue_that_tries_is_alive_while_it_cannot_sweep(tmp_path: Path):
    environ = {"GRISTMILL_CACHE_DIR": str(tmp_path)}
    settings = load(PROJECT / "configs" / "default.toml", environ).settings
    answers = [checks.rescue(settings)]
    for name in ("rescue.tried", "rescue.alive"):
        (tmp_path / name).touch()
        answers.append(checks.rescue(settings))

    assert answers == [Answer.SILENT, Answer.ALIVE, Answer.READY]
