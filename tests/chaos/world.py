"""The whole system as real processes, for faults to be done to.

    clients ──▶ api ──┐                  Every part reaches Postgres and Redis through proxies of
    worker-1 ─────────┼─▶ Postgres       its own; the tests' own connections go there directly.
    worker-2 ─────────┤   Redis
    rescue ───────────┤
    hooks ────────────┘──▶ a receiver of webhooks, whose first answer is 503

A part that ends without having been stopped is started again after `RESTART_S`, as a supervisor
would. Leases and sweeps are short, so that recovery takes seconds.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import httpx
import psutil
import psycopg
import redis

from app.broker.commands import ready_workers
from app.config.file import load
from app.errors import Unavailable
from app.local.child import Child
from app.local.ports import LOOPBACK, free_port
from app.worker.engine.host import LAUNCH
from tests.chaos.proxy import Proxy
from tests.chaos.servers import Servers
from tests.receivers import Hook, receiving

WORKERS: Final = ("worker-1", "worker-2")
PARTS: Final = ("api", *WORKERS, "rescue", "hooks")
SERVERS: Final = ("postgres", "redis")
MODELS: Final = ("stub", "stub-joins")  #: static batches, and sequences that join a running one

LEASE_S: Final = 3.0
SWEEP_S: Final = 0.2
LOST_AFTER_S: Final = 1.0
GRACE_S: Final = 1.5
STEP_TIMEOUT_S: Final = 2.0
RESTART_S: Final = 0.3
BATCH_SIZE: Final = 16
MAX_ATTEMPTS: Final = 10
"""Kills come far more often than in life; they are not to use up the attempts of good jobs."""

_FILES: Final = {
    "settings.toml": f"""
        cache_dir = "{{folder}}/cache"
        [database]
        statement_timeout_ms = 5_000
        lock_timeout_ms = 1_500
        [broker]
        socket_timeout_s = 3.0
        publish_timeout_s = 0.5
        visibility_timeout_s = 600
        [worker]
        lease_s = {LEASE_S}
        heartbeat_s = {LEASE_S / 4}
        grace_s = {GRACE_S}
        step_timeout_s = {STEP_TIMEOUT_S}
        max_attempts = {MAX_ATTEMPTS}
        [rescue]
        sweep_ms = {int(SWEEP_S * 1000)}
        lost_after_s = {LOST_AFTER_S}
        [webhooks]
        allow_networks = ["127.0.0.0/8"]
        timeout_s = 3
        [job_batches]
        max_open_lines = 15
    """,
    "models.toml": f"""
        [models.stub]
        source = "stub"
        kind = "generate"
        engine = "stub"
        default = true
        max_batch_size = {BATCH_SIZE}
        max_wait_ms = 30.0
        options = {{ step_ms = 0.3 }}
        [models.stub-joins]
        source = "stub"
        kind = "generate"
        engine = "stub"
        max_batch_size = {BATCH_SIZE}
        max_wait_ms = 30.0
        options = {{ step_ms = 0.3, joins = true }}
    """,
    "prices.toml": """
        [prices.cpu]
        per_device_hour = "0.036"
        currency = "USD"
    """,
}


class NotInTime(Exception):
    """Something that should have happened did not."""


class World(Servers):
    """A context manager: all is up inside. Parts are named as in PARTS.

    `environment` is added to every part's; `World.environment[part]` may be changed before a
    restart. Start parts from threads that outlive the world alone.
    """

    def __init__(self, folder: Path, *, environment: Mapping[str, str] | None = None) -> None:
        super().__init__(folder)
        self.proxies: dict[tuple[str, str], Proxy] = {}  #: by part and server
        self.environment: dict[str, dict[str, str]] = {p: dict(environment or {}) for p in PARTS}
        self.prefix: dict[str, list[str]] = {part: [] for part in PARTS}  #: of its command line
        self.restarts: dict[str, int] = dict.fromkeys(PARTS, 0)  #: by the keeper
        self.reload_s = 0.0  #: longest time that a worker took to be ready; set it to begin anew
        self._api_port = free_port()
        self._children: dict[str, Child] = {}
        self._kept: set[str] = set()
        self._loading: dict[str, float] = {}  #: workers that are not ready yet, and since when
        self._changing = threading.RLock()
        self._ended = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for name, text in _FILES.items():
                (self.folder / name).write_text(text.replace("{folder}", str(self.folder)))
            self.start_servers()
            self.receiver = self._held.enter_context(receiving(_unwell_at_first()))
            for part in PARTS:
                for server, url in zip(SERVERS, self._server_urls, strict=True):
                    proxy = Proxy(_port(url))
                    self.proxies[part, server] = self._held.enter_context(proxy)
            self._keeper.start()
            for part in PARTS:
                self.start(part, wait=False)
            for part in PARTS:
                self.wait_ready(part)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._ended.set()
        if self._keeper.is_alive():
            self._keeper.join()
        for part in reversed(list(self._children)):
            self.resume(part)
            self._children[part].stop(3)
        self.stop_servers()

    @property
    def api_url(self) -> str:
        return f"http://{LOOPBACK}:{self._api_port}"

    @property
    def hook_url(self) -> str:
        return self.receiver.url()

    # ── parts ────────────────────────────────────────────────────────────────────────────────

    def start(self, part: str, *, wait: bool = True) -> None:
        """Start a part and keep it up; returns when it is ready, unless told not to wait."""
        with self._changing:
            self._start(part)
            self._kept.add(part)
        if wait:
            self.wait_ready(part)

    def wait_ready(self, part: str, timeout_s: float = 180.0) -> None:
        """A worker is ready when it has registered: its models are loaded then."""
        eventually(partial(self.is_ready, part), timeout_s, f"{part} ready")

    def is_ready(self, part: str) -> bool:
        if part == "api":
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{self.api_url}/readyz", timeout=2).is_success
            return False
        return part in ("rescue", "hooks") or self.worker_id(part) is not None

    def num_ready(self) -> int:
        """How many workers say themselves that they make progress."""
        url = {"GRISTMILL_BROKER__URL": self.redis.url}
        return len(ready_workers(load(self.folder / "settings.toml", url).settings, timeout_s=0.5))

    def api_readiness(self) -> str:
        """What the API says of itself: ready, degraded or unavailable; or why it says nothing."""
        try:
            answer = httpx.get(f"{self.api_url}/readyz", timeout=5)
        except httpx.TransportError as error:
            return type(error).__name__
        return str(answer.json()["status"])

    def stop_part(self, part: str, timeout_s: float = 15.0) -> None:
        """SIGTERM, and wait for the end; it stays down until it is started."""
        with self._changing:
            self._kept.discard(part)
            self._children[part].stop(timeout_s)

    def restart(self, part: str) -> None:
        self.stop_part(part)
        self.start(part)

    def send_signal(self, part: str, number: signal.Signals) -> None:
        """Send a signal to the process of a part alone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid(part), number)

    def kill_group(self, part: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a part and to all its children; after SIGKILL it is started again."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid(part))
            for each in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.send_signal(number)

    def freeze(self, part: str) -> None:
        self.kill_group(part, signal.SIGSTOP)

    def resume(self, part: str) -> None:
        with contextlib.suppress(AssertionError):
            self.kill_group(part, signal.SIGCONT)

    def pid(self, part: str) -> int:
        pid = self._children[part].pid
        assert pid is not None
        return pid

    def is_up(self, part: str) -> bool:
        return part in self._children and self._children[part].exit_code is None

    def exit_code(self, part: str) -> int | None:
        return self._children[part].exit_code

    @contextlib.contextmanager
    def unkept(self, part: str) -> Iterator[None]:
        """Inside, a part that ends stays down; after, it is up again."""
        with self._changing:
            self._kept.discard(part)
        try:
            yield
        finally:
            if self.is_up(part):
                with self._changing:
                    self._kept.add(part)
            else:
                self.start(part)

    def engine_pid(self, part: str) -> int | None:
        """The engine process of a worker."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.pid(part)).children():
                with contextlib.suppress(psutil.Error):
                    if str(LAUNCH) in child.cmdline():
                        return child.pid
        return None

    def worker_id(self, part: str) -> str | None:
        """The id under which the present process of a worker has registered."""
        found = self.rows(
            "SELECT id FROM workers WHERE pid = %s AND stopped_at IS NULL"
            " AND lease_expires_at > now() AND started_at > to_timestamp(%s)"
            " ORDER BY started_at DESC",
            self.pid(part),
            psutil.Process(self.pid(part)).create_time() - 2,
        )
        return str(found[0]["id"]) if found else None

    def num_running(self, part: str) -> int:
        """Jobs that a worker has claimed and not ended."""
        return int(
            self.value(
                "SELECT count(*) FROM jobs JOIN workers ON workers.id = worker_id"
                " WHERE state = 'running' AND pid = %s",
                self.pid(part),
            )
        )

    def wait_running(self, part: str, at_least: int = 1, timeout_s: float = 60.0) -> None:
        """Return in the middle of a batch of a worker."""
        eventually(lambda: self.num_running(part) >= at_least, timeout_s, f"a batch of {part}")

    @contextlib.contextmanager
    def postgres_replaced(self, url: str) -> Iterator[None]:
        """Inside, the parts find another server where Postgres was."""
        try:
            for part in PARTS:
                self.proxies[part, "postgres"].redirect(_port(url))
            yield
        finally:
            for part in PARTS:
                self.proxies[part, "postgres"].redirect(_port(self.postgres.url))

    # ── measures ─────────────────────────────────────────────────────────────────────────────

    def log_sizes(self) -> dict[str, int]:
        return {file.name: file.stat().st_size for file in self.logs.glob("*.log")}

    def logged_since(self, sizes: Mapping[str, int]) -> dict[str, str]:
        """What each part has logged since then."""
        return {
            part: (self.logs / f"{part}.log")
            .read_bytes()[sizes.get(f"{part}.log", 0) :]
            .decode(errors="replace")
            for part in PARTS
        }

    def rss(self) -> dict[str, int]:
        """Resident bytes of each part, children included, and of Redis."""
        found: dict[str, int] = {}
        with contextlib.suppress(redis.RedisError), self.redis_client() as client:
            found["redis"] = int(client.info("memory")["used_memory_rss"])
        for part in self._children:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(self.pid(part))
                each = [process, *process.children(recursive=True)]
                found[part] = sum(one.memory_info().rss for one in each)
        return found

    def connections(self) -> dict[str, int]:
        """Open connections of the parts at each server, as the proxies see them."""
        return {
            server: sum(self.proxies[part, server].counts.open for part in PARTS)
            for server in SERVERS
        }

    # ── inside ───────────────────────────────────────────────────────────────────────────────

    @property
    def _server_urls(self) -> tuple[str, str]:
        return self.postgres.url, self.redis.url

    def _start(self, part: str) -> None:
        name = "worker" if part in WORKERS else part
        child = Child(
            part,
            [*self.prefix[part], sys.executable, "-m", "app.cli", name],
            self.logs / f"{part}.log",
            env=self._environment(part),
        )
        child.start()
        self._children[part] = child
        if part in WORKERS:
            self._loading[part] = time.monotonic()

    def _environment(self, part: str) -> dict[str, str]:
        ours = {name: text for name, text in os.environ.items() if not name.startswith("GRISTMILL")}
        postgres, redis_ = (
            url.replace(f":{_port(url)}/", f":{self.proxies[part, server].port}/")
            for server, url in zip(SERVERS, self._server_urls, strict=True)
        )
        return ours | {
            "GRISTMILL_CONFIG": str(self.folder / "settings.toml"),
            "GRISTMILL_DATABASE__URL": postgres,
            "GRISTMILL_BROKER__URL": redis_,
            "GRISTMILL_API__PORT": str(self._api_port),
            "OMP_NUM_THREADS": "1",
            **self.environment[part],
        }

    def _keep(self) -> None:
        while not self._ended.wait(0.05):
            with contextlib.suppress(psycopg.OperationalError, psutil.Error):
                self._measure_reloads()
            for part in list(self._kept):
                if not self.is_up(part):
                    self._ended.wait(RESTART_S)
                    with self._changing:
                        if part in self._kept and not self.is_up(part):
                            self.restarts[part] += 1
                            self._start(part)

    def _measure_reloads(self) -> None:
        for part, since in list(self._loading.items()):
            if self.is_ready(part):
                self.reload_s = max(self.reload_s, time.monotonic() - since)
                del self._loading[part]


def _unwell_at_first() -> Callable[[Hook], tuple[int, dict[str, str]]]:
    seen = itertools.count()
    return lambda _: (204 if next(seen) else 503, {})


AWAY: Final = (Unavailable, psycopg.OperationalError, redis.ConnectionError, psutil.Error)


def eventually(is_so: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The first true answer; raises `NotInTime`. An answer that cannot be had now is a no."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(*AWAY):
            if answer := is_so():
                return answer
        if time.monotonic() > deadline:
            raise NotInTime(f"Not within {timeout_s:g} s: {what}.")
        time.sleep(0.05)


def _port(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])
