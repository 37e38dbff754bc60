"""A worker's ear for cancels while Redis is away."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any
from uuid import uuid4

import pytest
import redis

from app.broker import cancels


class Away:
    """In place of a Celery app: counts who tries to connect."""

    def __init__(self) -> None:
        self.num_tries = 0

    @contextmanager
    def connection_for_read(self) -> Iterator[Any]:
        self.num_tries += 1
        raise redis.ConnectionError
        yield


def test_rows_are_looked_at_more_often_than_a_server_that_is_away_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # given a server that takes no connection
    monkeypatch.setattr(cancels, "POLL_S", 0.001)
    away, stop = Away(), threading.Event()

    # when a worker looks at its rows twenty times
    looks = list(islice(cancels.hear(away, uuid4(), "", stop), 20))  # type: ignore[arg-type]

    # then it has tried the server a few times: one that stands still keeps what is left of each
    assert looks == [None] * 20
    assert away.num_tries == 4


def test_it_ends_when_it_is_told_to_while_the_server_is_away() -> None:
    stop = threading.Event()
    hearing = cancels.hear(Away(), uuid4(), "", stop)  # type: ignore[arg-type]

    assert next(hearing) is None
    stop.set()

    assert list(hearing) == []
