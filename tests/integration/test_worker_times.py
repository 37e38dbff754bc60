"""Times that messages carry, and a Postgres that goes away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from app.broker.publisher import Publisher
from app.config.settings import Settings
from app.errors import Unavailable
from app.local.servers import EmbeddedPostgres
from app.rescue import Rescue
from app.store.database import Database
from app.store.migration import migrate
from tests.waiting import eventually
from tests.workers import results, rows, running_worker


@pytest.fixture
def config(make_settings: Callable[..., Settings], database_url: str, redis_url: str) -> Settings:
    return small(make_settings, database_url, redis_url)


def small(make_settings: Callable[..., Settings], database_url: str, redis_url: str) -> Settings:
    stub = {
        "source": "stub",
        "engine": "stub",
        "default": True,
        "max_batch_size": 4,
        "default_max_tokens": 64,
    }
    return make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        worker={"lease_s": 2, "heartbeat_s": 0.5},
        rescue={"sweep_ms": 100, "lost_after_s": 1},
        models={"stub": stub | {"kind": "generate"}, "stub-embed": stub | {"kind": "embed"}},
    )


@contextmanager
def rescuing(config: Settings) -> Iterator[None]:
    """Sweeps, as the rescue process does."""
    database, publisher = Database(config.database.url), Publisher(config)
    rescue, stop = Rescue(config, database, publisher), threading.Event()

    def sweep() -> None:
        while not stop.wait(config.rescue.sweep_ms / 1000):
            try:
                rescue.sweep()
            except Unavailable:
                continue

    thread = threading.Thread(target=sweep)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        publisher.close()
        database.close()


def send(producer: Celery, prompt: str, **options: Any) -> str:
    return str(producer.send_task("inference.generate", kwargs={"prompt": prompt}, **options).id)


def all_ended(config: Settings, ids: list[str], timeout_s: float = 30) -> list[dict[str, Any]]:
    eventually(lambda: results(config).keys() >= set(ids), timeout_s)
    return [results(config)[id_] for id_ in ids]


def test_a_countdown_runs_when_its_time_has_come(
    config: Settings, producer: Celery, tmp_path: Path
) -> None:
    with rescuing(config), running_worker(config, tmp_path / "worker"):
        id_ = send(producer, "later", countdown=2)
        [found] = all_ended(config, [id_])

    [job] = rows(config, "SELECT * FROM jobs WHERE id = %s", id_)
    assert found["state"] == "completed"
    assert found["claimed_at"] >= job["not_before"]


def test_a_message_that_expired_ends_as_expired_and_never_runs(
    config: Settings, producer: Celery, tmp_path: Path
) -> None:
    with rescuing(config), running_worker(config, tmp_path / "worker"):
        id_ = send(producer, "too late", expires=-5)
        [found] = all_ended(config, [id_])

    assert (found["state"], found["attempt_id"]) == ("expired", None)


def test_a_job_that_expires_while_it_waits_inside_the_worker_never_reaches_the_device(
    config: Settings, producer: Celery, tmp_path: Path
) -> None:
    # No rescue here: the claim alone keeps what is late from the device.
    with running_worker(config, tmp_path / "worker"):
        first = send(producer, "sleep 4000")
        eventually(lambda: rows(config, "SELECT id FROM attempts WHERE job_id = %s", first))
        late = send(producer, "too late", expires=2)
        held = "SELECT id FROM jobs WHERE id = %s AND received_by IS NOT NULL"
        eventually(lambda: rows(config, held, late))
        last = send(producer, "in time")
        all_ended(config, [first, last])

        [over] = rows(config, "SELECT deadline <= now() AS over FROM jobs WHERE id = %s", late)
        assert over["over"]
        assert rows(config, "SELECT id FROM attempts WHERE job_id = %s", late) == []
    assert late not in results(config)


def test_a_job_past_its_deadline_is_cut_short_while_it_runs(
    config: Settings, producer: Celery, tmp_path: Path
) -> None:
    with rescuing(config), running_worker(config, tmp_path / "worker"):
        id_ = send(producer, "sleep 60000", expires=2)
        [found] = all_ended(config, [id_])

    assert (found["state"], found["error_code"]) == ("expired", "deadline_exceeded")
    assert found["attempt_id"] is not None


def test_while_postgres_is_away_nothing_is_lost_and_the_worker_goes_on_by_itself(
    make_settings: Callable[..., Settings], redis_url: str, tmp_path: Path
) -> None:
    server = EmbeddedPostgres(tmp_path / "postgres").start()
    config = small(make_settings, server.url, redis_url)
    migrate(server.url)
    with (
        Celery("somebody-else", broker=redis_url, set_as_current=False) as producer,
        rescuing(config),
        running_worker(config, tmp_path / "worker"),
    ):
        before = send(producer, "sleep 500")
        eventually(lambda: rows(config, "SELECT FROM jobs WHERE state = 'running'"))

        server.stop()
        meanwhile = [send(producer, f"p {n}") for n in range(8)]
        server.start()

        found = all_ended(config, [before, *meanwhile], timeout_s=60)
    server.stop()

    assert {row["state"] for row in found} == {"completed"}
