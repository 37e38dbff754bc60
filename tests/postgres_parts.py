"""What people put around Postgres: a hot standby, and PgBouncer."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from pathlib import Path
from typing import Final, Self

import psycopg
import pytest

from app.local.child import Child
from app.local.ports import LOOPBACK, free_port
from app.local.servers import EmbeddedPostgres, _not_root

PGBOUNCER: Final = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")

needs_pgbouncer = pytest.mark.skipif(PGBOUNCER is None, reason="pgbouncer is not installed")


class Standby(EmbeddedPostgres):
    """A hot standby of an embedded server: it answers what only reads, until it is promoted."""

    def __init__(self, folder: Path, primary: EmbeddedPostgres) -> None:
        super().__init__(folder, durable=False)
        self._primary = primary

    def _create(self, password: str) -> None:
        # as the primary's user, whose password comes with its data
        (self._folder / "password").write_text(self._primary.url.split(":")[2].partition("@")[0])
        command = [self._binary("pg_basebackup"), "-D", str(self._data), "-d", self._primary.url]
        self._run([*command, "-R", "-X", "stream", "-c", "fast", "--no-sync"], "")

    def start(self) -> Self:
        super().start()
        primary = self._primary.url
        self.url = primary.replace(primary.rpartition(":")[2].partition("/")[0], str(self._port))
        return self

    def _is_ready(self) -> bool:
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[7].strip() in ("standby", "ready")

    def promote(self) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            assert connection.execute("SELECT pg_promote()").fetchone() == (True,)

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self._port}"


class PgBouncer:
    """A pooler before a server, for all its databases. `ignored`: what it ignores at the start."""

    def __init__(
        self, folder: Path, server_url: str, mode: str, ignored: str = "", pool_size: int = 5
    ) -> None:
        self._folder = folder
        self._server = psycopg.conninfo.conninfo_to_dict(server_url)
        self._port = free_port()
        self._settings = {
            "pool_mode": mode,
            "listen_addr": LOOPBACK,
            "listen_port": self._port,
            "unix_socket_dir": "",
            "auth_type": "plain",
            "auth_file": folder / "users",
            "default_pool_size": pool_size,
            "max_client_conn": 200,
            "ignore_startup_parameters": ignored,
        }
        self._child: Child | None = None

    @property
    def url(self) -> str:
        server = self._server
        name = f"{server['user']}:{server['password']}"
        return f"postgresql://{name}@{LOOPBACK}:{self._port}/{server['dbname']}"

    def start(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        server = self._server
        (self._folder / "users").write_text(f'"{server["user"]}" "{server["password"]}"\n')
        settings = "\n".join(f"{name} = {value}" for name, value in self._settings.items())
        configuration = self._folder / "pgbouncer.ini"
        configuration.write_text(
            f"[databases]\n* = host={server['host']} port={server['port']}\n"
            f"[pgbouncer]\n{settings}\n"
        )
        assert PGBOUNCER is not None
        self._child = Child(
            "PgBouncer",
            [PGBOUNCER, str(configuration)],
            self._folder / "pgbouncer.log",
            prefix=_not_root(self._folder),
        )
        self._child.start()
        self._child.wait_until(self._listens, 20)
        return self

    def _listens(self) -> bool:
        try:
            socket.create_connection((LOOPBACK, self._port), timeout=1).close()
        except OSError:
            return False
        return True

    def send_signal(self, number: signal.Signals) -> None:
        assert self._child is not None
        assert self._child.pid is not None
        os.kill(self._child.pid, number)

    def stop(self) -> None:
        if self._child:
            self._child.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
