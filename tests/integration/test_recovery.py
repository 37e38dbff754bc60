"""What comes back by itself: after a killed worker, an emptied Redis, a Postgres that went away."""

from __future__ import annotations

import base64
import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from app import requests
from app.broker import Publisher, raw_message
from app.config import Settings
from app.engines.base import Kind
from app.errors import Unavailable
from app.local import EmbeddedPostgres
from app.rescue import Rescue
from app.store.database import Database, migrate
from app.store.intake import NewJob, insert_jobs, mark_enqueued
from tests.waiting import eventually
from tests.workers import Worker, results, rows, running_worker


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


@pytest.fixture
def producer(config: Settings) -> Iterator[Celery]:
    with Celery("somebody-else", broker=config.broker.url, set_as_current=False) as app:
        yield app


def send(producer: Celery, prompt: str, **options: Any) -> str:
    return str(producer.send_task("inference.generate", kwargs={"prompt": prompt}, **options).id)


def all_ended(config: Settings, ids: list[str], timeout_s: float = 30) -> list[dict[str, Any]]:
    eventually(lambda: results(config).keys() >= set(ids), timeout_s)
    return [results(config)[id_] for id_ in ids]


def test_every_job_of_a_killed_worker_ends_exactly_once(
    config: Settings, producer: Celery, tmp_path: Path
) -> None:
    with rescuing(config):
        doomed = Worker(config, tmp_path / "first").start()
        ids = [send(producer, f"p {n}\nsleep 1000") for n in range(12)]
        eventually(lambda: rows(config, "SELECT FROM jobs WHERE state = 'running'"))
        eventually(lambda: len(rows(config, "SELECT FROM jobs")) >= 8)  # running and prefetched

        doomed.kill()
        with running_worker(config, tmp_path / "second"):
            found = all_ended(config, ids)

    assert {row["state"] for row in found} == {"completed"}
    lost = rows(config, "SELECT * FROM attempts WHERE outcome = 'lost'")
    assert 1 <= len(lost) <= 4
    assert len(rows(config, "SELECT FROM attempts WHERE outcome = 'succeeded'")) == len(ids)


def test_an_emptied_redis_loses_no_queued_job(config: Settings, tmp_path: Path) -> None:
    database = Database(config.database.url)
    queued = submit_rows(config, database, 30)

    with redis.Redis.from_url(config.broker.url) as client:
        client.flushdb()
    with rescuing(config), running_worker(config, tmp_path / "again"):
        found = all_ended(config, queued)
    database.close()

    assert {row["state"] for row in found} == {"completed"}


def submit_rows(config: Settings, database: Database, number: int) -> list[str]:
    """Jobs whose messages were sent, as the API leaves them."""
    made = []
    for n in range(number):
        request = requests.parse({"prompt": f"queued {n}"})
        made.append(
            NewJob(
                id=uuid.uuid4(),
                model="stub",
                kind=Kind.GENERATE,
                url=request.url,
                request=request.raw,
                fingerprint=request.fingerprint,
                source="api",
            )
        )
    with database.begin() as connection:
        insert_jobs(connection, made)
        mark_enqueued(connection, [job.id for job in made])
    return [str(job.id) for job in made]


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


def test_a_job_past_its_deadline_is_cut_short_while_it_runs(
    config: Settings, producer: Celery, tmp_path: Path
) -> None:
    with rescuing(config), running_worker(config, tmp_path / "worker"):
        id_ = send(producer, "sleep 60000", expires=2)
        [found] = all_ended(config, [id_])

    assert (found["state"], found["error_code"]) == ("expired", "deadline_exceeded")
    assert found["attempt_id"] is not None


def envelope(**changes: Any) -> Callable[[str], bytes]:
    """A good message with some of its parts replaced."""

    def make(id_: str) -> bytes:
        message = json.loads(raw_message(id_, Kind.GENERATE, {"prompt": "x"}, queue="celery"))
        for path, value in changes.items():
            parent: Any = message
            *parents, last = path.split("__")
            for name in parents:
                parent = parent[name]
            if value is ...:
                parent.pop(last, None)
            else:
                parent[last] = value
        return json.dumps(message).encode()

    return make


def body(value: Any) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


BAD: dict[str, tuple[Callable[[str], bytes], str]] = {
    "unknown task": (envelope(headers__task="tasks.add"), "invalid_request"),
    "no arguments and no row": (envelope(body=body([[], {}, {}])), "invalid_request"),
    "extra argument": (envelope(body=body([[], {"prompt": "x", "y": 1}, {}])), "invalid_request"),
    "wrong type": (envelope(body=body([[], {"prompt": 3}, {}])), "invalid_request"),
    "embeds": (
        envelope(body=body([[], {"prompt": "x"}, {"callbacks": [{"task": "t"}]}])),
        "invalid_request",
    ),
    "unknown model": (
        envelope(body=body([[], {"prompt": "x", "model": "gpt-9"}, {}])),
        "model_not_found",
    ),
    "pickle": (
        envelope(**{"content-type": "application/x-python-serialize"}),
        "invalid_request",
    ),
    "body is not base64": (envelope(body="%%%"), "invalid_request"),
    "no properties": (envelope(properties=...), "invalid_request"),
    "no delivery tag": (envelope(properties__delivery_tag=...), "invalid_request"),
    "headers with a bad eta": (envelope(headers__eta="soon"), "invalid_request"),
    "prompt over the context": (
        envelope(body=body([[], {"prompt": "word " * 50_000}, {}])),
        "context_length_exceeded",
    ),
    "100 MB": (envelope(body="A" * 100_000_000), "request_too_large"),
}
NAMELESS: dict[str, bytes] = {
    "not JSON": b"{nope",
    "not UTF-8": b"\xff\xfe\x00",
    "a list": b"[1, 2]",
    "empty": b"",
    "no headers": b'{"body": "e30="}',
}


def test_no_message_stops_the_worker_and_each_that_has_an_id_fails_with_its_reason(
    config: Settings, tmp_path: Path
) -> None:
    ids = {case: str(uuid.uuid4()) for case in BAD}
    good = str(uuid.uuid4())
    with running_worker(config, tmp_path / "worker") as worker:
        with redis.Redis.from_url(config.broker.url) as client:
            for item in NAMELESS.values():
                client.lpush("celery", item)
            for case, (make, _) in BAD.items():
                client.lpush("celery", make(ids[case]))
            client.lpush("celery", envelope()(good))
            all_ended(config, [*ids.values(), good], timeout_s=60)
            eventually(lambda: client.hlen("unacked") == 0)
        log = worker.log

    found = results(config)
    assert found[good]["state"] == "completed"
    for case, (_, code) in BAD.items():
        row = found[ids[case]]
        assert (case, row["state"], row["error_code"]) == (case, "failed", code)
        assert row["error_message"]
    assert len(found) == len(BAD) + 1
    assert "Unrecoverable" not in log
    assert "Connection to broker lost" not in log


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
