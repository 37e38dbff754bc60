"""What the worker's pool does as it starts."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from kombu.asynchronous import Hub

from app.worker.pool import pool
from app.worker.pool.pool import EnginePool


@pytest.fixture
def as_before() -> Iterator[None]:
    hangup = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, hangup)
    signal.set_wakeup_fd(-1)
    gc.unfreeze()


@pytest.fixture
def started(as_before: None, monkeypatch: pytest.MonkeyPatch) -> EnginePool:
    assembly = SimpleNamespace(
        start=lambda: None, runner=SimpleNamespace(failure=None, post=lambda _: None)
    )
    monkeypatch.setattr(pool, "check_kind", lambda _: None)
    monkeypatch.setattr(pool, "assemble", lambda *_, **__: assembly)
    started = EnginePool(app=SimpleNamespace(settings=None))
    started.on_start()
    return started


@pytest.fixture
def hub() -> Iterator[Hub]:
    """It has nothing to do."""
    hub = Hub()
    yield hub
    hub.close()


def waits(hub: Hub) -> bool:
    """Whether the hub would wait now, and not turn at once."""
    return not hub.poller.poll(0)


def test_a_signal_ends_the_wait_of_the_hub_which_looks_then_whether_to_shut_down(
    started: EnginePool, hub: Hub
) -> None:
    # given
    started.register_with_event_loop(hub)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    assert waits(hub)
    # when
    signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
    # then it turns, once
    assert not waits(hub)
    hub.call_later(60, lambda: None)
    hub.run_once()
    assert waits(hub)


def test_the_end_of_the_runner_ends_the_wait_of_the_hub(started: EnginePool, hub: Hub) -> None:
    # given
    started.register_with_event_loop(hub)
    assert waits(hub)
    # when
    started._runner_ended()
    # then
    assert not waits(hub)


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
