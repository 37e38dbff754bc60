"""Real servers for the tests: one embedded Postgres and one embedded Redis for the session.

`database_url` and `redis_url` are empty and migrated for each test. A test that stops or breaks a
server starts one of its own: `EmbeddedPostgres(tmp_path / "postgres")`.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import hypothesis
import hypothesis.configuration
import psycopg
import pytest
import redis

from app.config.settings import ModelSettings, PriceSettings, Settings
from app.local.servers import EmbeddedPostgres, EmbeddedRedis

ROOT = Path(__file__).resolve().parents[1]

# Models of the tests are tiny, and processes share the cores: more threads of an operator would
# only wait for each other. torch reads it when it is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

hypothesis.configuration.set_hypothesis_home_dir(ROOT / ".cache" / "hypothesis")
# No test asserts a time: on a busy machine an example may take any. The examples are the same each
# time, so that a failure comes of a change; `make properties` draws others.
hypothesis.settings.register_profile(
    "gristmill",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("gristmill")


MEMORY: Final = Path("/dev/shm")

SYSTEMS: Final = ("tests/e2e/", "tests/chaos/")
"""Tests that start whole systems: they begin first, for they take longest, and where two processes
share the tests they run one after the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not item.nodeid.startswith(SYSTEMS))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests run in one process, and so do all that start whole systems."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "whole systems" if file.startswith(SYSTEMS) else file

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the settings of whoever runs the tests, or those of another test."""
    for name in list(os.environ):
        if name.startswith("GRISTMILL_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GRISTMILL_CONFIG", "")  # what --config sets is taken back, too


@pytest.fixture(scope="session")
def servers_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """In memory where there is room: a database is 500 files, and most tests want one of their own.

    A disk takes many times as long to make them.
    """
    if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 << 30:
        with tempfile.TemporaryDirectory(dir=MEMORY, prefix="gristmill-tests-") as folder:
            yield Path(folder)
    else:
        yield tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def postgres_server(servers_folder: Path) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(servers_folder / "postgres", durable=False) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server(servers_folder: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(servers_folder / "redis") as server:
        yield server


@pytest.fixture(scope="session")
def empty_databases(postgres_server: EmbeddedPostgres) -> Callable[[str], str]:
    """`empty_databases(template)` copies a database of the session's server; returns its URL."""
    numbers = itertools.count(1)

    def create(template: str) -> str:
        name = f"test_{next(numbers)}"
        with psycopg.connect(postgres_server.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        return postgres_server.url.removesuffix("gristmill") + name

    return create


@pytest.fixture(scope="session")
def migrated_template(empty_databases: Callable[[str], str]) -> str:
    """Name of a database with the newest schema and no rows."""
    from app.store.migration import migrate

    url = empty_databases("template0")
    migrate(url)
    return url.rpartition("/")[2]


@pytest.fixture
def empty_database_url(
    empty_databases: Callable[[str], str], postgres_server: EmbeddedPostgres
) -> Iterator[str]:
    """A database without any schema."""
    url = empty_databases("template0")
    yield url
    _drop(postgres_server, url)


@pytest.fixture
def database_url(
    empty_databases: Callable[[str], str],
    migrated_template: str,
    postgres_server: EmbeddedPostgres,
) -> Iterator[str]:
    """A database with the newest schema and no rows."""
    url = empty_databases(migrated_template)
    yield url
    _drop(postgres_server, url)


def _drop(server: EmbeddedPostgres, url: str) -> None:
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")


@pytest.fixture(scope="session")
def empty_redis(redis_server: EmbeddedRedis) -> Callable[[], str]:
    """`empty_redis()` empties a logical database of the session's server; returns its URL. The next
    one is another, so stragglers do no harm."""
    numbers = itertools.count()

    def empty() -> str:
        url = redis_server.url.removesuffix("/0") + f"/{next(numbers) % 128}"
        with redis.Redis.from_url(url) as client:
            client.flushdb()
        return url

    return empty


@pytest.fixture
def redis_url(empty_redis: Callable[[], str]) -> str:
    """An empty logical database."""
    return empty_redis()


STUB_MODELS = {
    "stub": ModelSettings(source="stub", kind="generate", engine="stub", default=True),
    "stub-embed": ModelSettings(source="stub", kind="embed", engine="stub", default=True),
    "stub-classify": ModelSettings(source="stub", kind="classify", engine="stub", default=True),
    "stub-translate": ModelSettings(source="stub", kind="translate", engine="stub", default=True),
    "stub-rerank": ModelSettings(source="stub", kind="rerank", engine="stub", default=True),
}


@pytest.fixture
def make_settings(tmp_path: Path) -> Callable[..., Settings]:
    """`make_settings(worker={"lease_s": 2}, …)`: stub models, a price, a cache of its own."""

    def make(**given: Any) -> Settings:
        defaults = {
            "cache_dir": str(tmp_path / "cache"),
            "models": STUB_MODELS,
            "prices": {"cpu": PriceSettings(per_device_hour="0.036", currency="USD")},
            "api": {"port": 0},
            "flower": {"port": 0},
        }
        # No test depends on how fast the disk is: those that wait for a timeout set their own.
        given["database"] = {"statement_timeout_ms": 90_000} | given.get("database", {})
        return Settings.model_validate(defaults | given)

    return make


@pytest.fixture
def settings(make_settings: Callable[..., Settings], database_url: str, redis_url: str) -> Settings:
    """Settings on the two test servers."""
    return make_settings(database={"url": database_url}, broker={"url": redis_url})
