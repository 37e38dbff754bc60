"""Receivers of webhooks for the tests: HTTP servers that note what they get and answer as told; and
processes that deliver to them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from app.config.settings import Settings


@dataclass
class Hook:
    """A request that came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        return dict(json.loads(self.body))

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


Answer = Callable[[Hook], tuple[int, dict[str, str]]]


def fine(_: Hook) -> tuple[int, dict[str, str]]:
    return 204, {}


@dataclass
class Receiver:
    port: int
    answer: Answer = fine
    hooks: list[Hook] = field(default_factory=list)

    def url(self, path: str = "/hook") -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@contextmanager
def receiving(answer: Answer = fine) -> Iterator[Receiver]:
    """A receiver on a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            hook = Hook(self.path, headers, body)
            receiver.hooks.append(hook)
            status, more = receiver.answer(hook)
            self.send_response(status)
            for name, value in more.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver = Receiver(server.server_address[1], answer)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()


_MAIN = """
import sys
from pathlib import Path
from app import hooks, telemetry
from app.config.settings import Settings

telemetry.setup_logging()
hooks.serve(Settings.model_validate_json(Path(sys.argv[1]).read_text()))
"""


@contextmanager
def running_hooks(settings: Settings, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A deliverer process that is killed at the end of the block; its log is `hooks.log`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    file.write_text(settings.model_dump_json())
    with (folder / "hooks.log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-c", _MAIN, str(file)], stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
