"""Workers that are stopped, replaced and asked how they are."""

from __future__ import annotations

import os
import signal
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import redis
from celery import Celery

from app.broker.commands import ready_workers
from app.config.settings import Settings
from app.jobs import Kind
from app.local import checks
from app.local.upkeep import Answer
from app.store.database import Database
from tests.own_redis import running_redis
from tests.rescues import running_rescue
from tests.rows import insert, new_job
from tests.waiting import eventually
from tests.workers import Worker, results, rows, running_worker


@pytest.fixture
def config(make_settings: Callable[..., Settings], database_url: str, redis_url: str) -> Settings:
    stub = {
        "source": "stub",
        "kind": "generate",
        "engine": "stub",
        "default": True,
        "max_batch_size": 4,
        "max_wait_ms": 20,
        "options": {"step_ms": 1},
    }
    return make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        worker={"lease_s": 4, "heartbeat_s": 0.5, "grace_s": 600},
        rescue={"sweep_ms": 200, "lost_after_s": 1},
        models={"stub": stub},
    )


DEAF = """
from app.broker import transport
transport.Channel._brpop_start = lambda *given, **named: None
"""
"""A worker that never asks Redis for a message."""


def watched(config: Settings) -> Settings:
    """With a watchdog that is soon sure."""
    worker = config.worker.model_copy(update={"stall_timeout_s": 2.0})
    return config.model_copy(update={"worker": worker})


def send(producer: Celery, prompt: str) -> str:
    return str(producer.send_task("inference.generate", kwargs={"prompt": prompt}).id)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_second_signal_gives_back_at_once_and_uncharged_what_runs(
    config: Settings, producer: Celery, tmp_path: Path, second: signal.Signals
) -> None:
    with running_worker(config, tmp_path / "worker") as worker:
        id_ = send(producer, "sleep 600000")
        eventually(lambda: rows(config, "SELECT FROM jobs WHERE state = 'running'"))

        worker.send_signal(signal.SIGTERM)
        eventually(lambda: "Warm shutdown" in worker.log)
        worker.send_signal(second)
        worker.wait(30)

    [job] = rows(config, "SELECT * FROM jobs WHERE id = %s", id_)
    assert (job["state"], job["attempts_charged"], job["losses"]) == ("queued", 0, 0)
    assert [each["outcome"] for each in rows(config, "SELECT * FROM attempts")] == ["released"]
    with redis.Redis.from_url(config.broker.url) as client:
        assert client.hlen("unacked") == 0


@pytest.mark.slow
def test_a_rolling_restart_of_two_workers_loses_and_doubles_nothing(
    config: Settings, producer: Celery, tmp_path: Path
) -> None:
    # given two workers under a steady stream of jobs
    ids: list[str] = []
    stop = threading.Event()

    def stream() -> None:
        while not stop.wait(0.02):
            ids.append(send(producer, f"job {len(ids)}\nsleep 100"))

    workers = [Worker(config, tmp_path / f"worker {n}").start() for n in range(2)]
    thread = threading.Thread(target=stream)
    thread.start()
    try:
        with running_rescue(config, tmp_path / "rescue"):
            # when one after the other is stopped and started
            for worker in workers:
                eventually(lambda: rows(config, "SELECT FROM jobs WHERE state = 'running'"))
                worker.send_signal(signal.SIGTERM)
                worker.wait(60)
                worker.start()
            stop.set()
            thread.join()
            found = eventually(lambda: (all_ := results(config)).keys() >= set(ids) and all_, 60)
    finally:
        stop.set()
        for worker in workers:
            worker.kill()

    # then each job ran once and completed
    assert {row["state"] for row in found.values()} == {"completed"}
    ran = rows(config, "SELECT FROM attempts WHERE outcome = 'succeeded'")
    assert len(ran) == len(ids)
    others = rows(config, "SELECT * FROM attempts WHERE outcome <> 'succeeded'")  # claimed ahead
    assert {(each["outcome"], each["charged"], each["device_ns"]) for each in others} <= {
        ("released", False, 0)
    }


def test_a_worker_is_ready_again_after_its_engine_was_stopped_or_its_database_was_away(
    config: Settings, producer: Celery, tmp_path: Path
) -> None:
    def is_ready() -> bool:
        return bool(ready_workers(config, timeout_s=0.5))

    with running_worker(config, tmp_path / "worker") as worker:
        eventually(is_ready, 30)
        [engine] = psutil.Process(worker.pid).children()

        # an engine that hangs in a step, then goes on
        send(producer, "sleep 600000")
        eventually(lambda: rows(config, "SELECT FROM jobs WHERE state = 'running'"))
        os.kill(engine.pid, signal.SIGSTOP)
        eventually(lambda: not is_ready(), 60)
        os.kill(engine.pid, signal.SIGCONT)
        eventually(is_ready, 60)

        # a database that takes no connection, then does
        name = config.database.url.rpartition("/")[2]
        admin = config.model_copy(
            update={
                "database": config.database.model_copy(
                    update={"url": config.database.url.replace(name, "postgres")}
                )
            }
        )
        rows_of_none = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
        set_allowed = "UPDATE pg_database SET datallowconn = {} WHERE datname = %s RETURNING 1"
        rows(admin, set_allowed.format("false"), name)
        rows(admin, rows_of_none, name)
        eventually(lambda: not is_ready(), 60)
        rows(admin, set_allowed.format("true"), name)
        eventually(is_ready, 60)


def test_a_worker_that_stops_consuming_ends_with_a_clear_line(
    config: Settings, producer: Celery, tmp_path: Path
) -> None:
    config = watched(config)
    with running_worker(config, tmp_path / "worker", DEAF) as worker:
        eventually(lambda: ready_workers(config), 30)
        id_ = send(producer, "nobody takes this")

        assert worker.wait(60) == os.EX_SOFTWARE
        assert "messages wait in Redis and it has received none" in worker.log

    with running_worker(config, tmp_path / "next"):
        assert eventually(lambda: results(config).get(id_), 30)["state"] == "completed"


BROKEN = """
from app.worker.batcher import Batcher
def broken(*_): raise KeyError("a prompt")
Batcher.add = broken
"""
STANDS_STILL = """
import time
from app.worker.batcher import Batcher
Batcher.add = lambda *_: time.sleep(600)
"""

ROOMY = {
    "max_batch_size": 64,
    "max_wait_ms": 500,
    "max_batch_tokens": 1_000_000,
    "context_tokens": 10_000,
    "default_max_tokens": 10,
}


@pytest.mark.parametrize(
    ("bug", "last_words"),
    [(BROKEN, "The runner failed (KeyError"), (STANDS_STILL, "its runner has stood still")],
)
def test_a_bug_ends_a_worker_with_an_exit_status_of_failure(
    config: Settings, producer: Celery, tmp_path: Path, bug: str, last_words: str
) -> None:
    with running_worker(config, tmp_path / "worker", bug) as worker:
        send(producer, "what it fails at")

        assert worker.wait(60) == os.EX_SOFTWARE
        assert last_words in worker.log
        assert "a prompt" not in worker.log


def test_an_engine_process_that_is_stopped_while_it_is_sent_much_is_replaced(
    config: Settings, producer: Celery, tmp_path: Path
) -> None:
    # given a worker with room for 64 long prompts, and little patience
    model = config.models["stub"].model_copy(update=ROOMY)
    hasty = config.worker.model_copy(update={"step_timeout_s": 3})
    config = config.model_copy(update={"worker": hasty, "models": {"stub": model}})
    with running_worker(config, tmp_path / "worker") as worker:
        [engine] = psutil.Process(worker.pid).children()

        # when its engine process is stopped and all of them come
        engine.suspend()
        ids = [send(producer, str(n) * 4_000) for n in range(10, 74)]

        # then another one runs them
        found = eventually(lambda: (all_ := results(config)).keys() >= set(ids) and all_, 90)
        assert {row["state"] for row in found.values()} == {"completed"}
        assert not worker.has_ended
        assert not engine.is_running()


def test_garbage_without_ids_does_not_end_a_worker_that_takes_it_away(
    config: Settings, producer: Celery, tmp_path: Path
) -> None:
    # given a worker whose queue is never empty of messages that belong to no job
    config = watched(config)
    stop = threading.Event()

    def litter() -> None:
        with redis.Redis.from_url(config.broker.url) as client:
            while not stop.wait(0.005):
                if client.llen("celery") < 200:
                    client.lpush("celery", *["garbage"] * 100)

    thread = threading.Thread(target=litter)
    with running_worker(config, tmp_path / "worker") as worker:
        eventually(lambda: ready_workers(config), 30)
        thread.start()
        try:
            # then it lives for much longer than the watchdog waits
            for _ in range(6):
                assert ready_workers(config, timeout_s=2)
            assert not worker.has_ended
        finally:
            stop.set()
            thread.join()
        id_ = send(producer, "wheat")
        assert eventually(lambda: results(config).get(id_), 30)["state"] == "completed"


def test_a_worker_whose_queues_an_operator_cancelled_is_left_alone(
    config: Settings, producer: Celery, tmp_path: Path
) -> None:
    config = watched(config)
    with running_worker(config, tmp_path / "worker") as worker:
        eventually(lambda: ready_workers(config), 30)
        for queue in ("celery", "gristmill.stub"):
            producer.control.cancel_consumer(queue, reply=True, limit=1, timeout=5)
        id_ = send(producer, "for later")
        for _ in range(4):  # a second each: more than it would take to be ended
            assert ready_workers(config)
        assert id_ not in results(config)

        producer.control.add_consumer("celery", reply=True, limit=1, timeout=5)

        assert eventually(lambda: results(config).get(id_), 30)["state"] == "completed"
        assert not worker.has_ended


def test_a_task_name_of_a_newer_version_leaves_its_job_to_newer_workers(
    config: Settings, producer: Celery, tmp_path: Path
) -> None:
    database = Database(config.database.url)
    [id_] = insert(database, new_job(model="stub", kind=Kind.GENERATE))
    database.close()
    producer.send_task("inference.imagine", task_id=str(id_), kwargs={"query": "x"})
    unknown = str(uuid.uuid4())
    producer.send_task("inference.imagine", task_id=unknown, kwargs={"query": "x"})

    with running_worker(config, tmp_path / "worker"):
        refused = eventually(lambda: results(config).get(unknown), 30)

    assert "Unknown task name" in refused["error_message"]
    [job] = rows(config, "SELECT * FROM jobs WHERE id = %s", id_)
    assert (job["state"], job["received_by"]) == ("queued", None)


def test_a_frozen_worker_that_thaws_changes_nothing_and_works_on(
    config: Settings, producer: Celery, tmp_path: Path
) -> None:
    # given a worker that stands still, engine and all, for longer than its lease
    with (
        running_rescue(config, tmp_path / "rescue"),
        running_worker(config, tmp_path / "zombie") as zombie,
    ):
        id_ = send(producer, "taken from the zombie\nsleep 3000")
        eventually(lambda: rows(config, "SELECT FROM jobs WHERE state = 'running'"))
        family = [zombie.pid, *(each.pid for each in psutil.Process(zombie.pid).children())]
        for pid in family:
            os.kill(pid, signal.SIGSTOP)
        eventually(lambda: rows(config, "SELECT FROM attempts WHERE outcome = 'lost'"), 30)

        # when it thaws, it may get the job again itself
        for pid in family:
            os.kill(pid, signal.SIGCONT)
        found = eventually(lambda: results(config).get(id_), 60)

    assert found["state"] == "completed"
    attempts = rows(config, "SELECT * FROM attempts ORDER BY number")
    assert [each["outcome"] for each in attempts] == ["lost", "succeeded"]
    assert found["attempt_id"] == attempts[1]["id"]


def test_redis_away_is_not_ready_and_ready_again_when_it_is_back(
    config: Settings, tmp_path: Path
) -> None:
    with running_redis(tmp_path) as own:
        broker = config.broker.model_copy(update={"url": own.url})
        config = config.model_copy(update={"broker": broker})

        def is_ready() -> bool:

            return checks.worker(config) is Answer.READY

        with running_worker(config, tmp_path / "worker"):
            eventually(is_ready, 30)
            own.stop()
            assert not is_ready()
            own.start()
            eventually(is_ready, 60)
