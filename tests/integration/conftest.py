"""A pool on a fresh, migrated database; a service that enqueues; what clients of doors need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery

from app.config.settings import Settings
from app.store.database import Database
from tests.conftest import STUB_MODELS
from tests.doors import Doors, open_doors


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def producer(config: Settings) -> Iterator[Celery]:
    """A service's own Celery app, which knows nothing of Gristmill. `config` is the test file's."""
    with Celery("somebody-else", broker=config.broker.url, set_as_current=False) as app:
        yield app


@pytest.fixture(scope="module")
def doors_given() -> dict[str, Any]:
    """What the `doors` of a test file have of settings of their own."""
    return {}


@pytest.fixture(scope="module")
def doors_settings(
    doors_given: dict[str, Any],
    empty_databases: Callable[[str], str],
    migrated_template: str,
    empty_redis: Callable[[], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Settings:
    given: dict[str, Any] = {
        "cache_dir": str(tmp_path_factory.mktemp("doors")),
        "database": {"url": empty_databases(migrated_template)},
        "broker": {"url": empty_redis()},
        "models": STUB_MODELS,
        "worker": {"max_attempts": 1, "lease_s": 4, "heartbeat_s": 1},
    }
    return Settings(**given | doors_given)


@pytest.fixture(scope="module")
def doors(doors_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    """An API and a worker with stub models, which the tests of a file share."""
    with open_doors(doors_settings, tmp_path_factory.mktemp("worker")) as doors:
        yield doors
