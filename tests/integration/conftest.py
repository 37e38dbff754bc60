"""A pool on a fresh, migrated database; a service that enqueues."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import Celery

from app.config.settings import Settings
from app.store.database import Database


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
