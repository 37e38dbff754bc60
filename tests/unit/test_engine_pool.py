"""What the worker's pool does as it starts."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from app.worker.pool import pool
from app.worker.pool.pool import EnginePool


@pytest.fixture
def as_before() -> Iterator[None]:
    hangup = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, hangup)
    gc.unfreeze()


@pytest.mark.usefixtures("as_before")
def test_what_a_worker_starts_with_is_not_looked_through_again_for_garbage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # given
    gc.unfreeze()
    loaded = [[]]
    assembly = SimpleNamespace(start=lambda: None)
    monkeypatch.setattr(pool, "check_kind", lambda _: None)
    monkeypatch.setattr(pool, "assemble", lambda *_, **__: assembly)
    # when
    EnginePool(app=SimpleNamespace(settings=None)).on_start()
    # then
    assert gc.get_freeze_count() > 0
    assert all(each is not loaded for each in gc.get_objects())
