"""Celery's remote control and signals on a real worker: each works or says why not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.worker.control import Panel

from app.config.settings import Settings
from app.worker.pool.control import REFUSED
from tests.waiting import eventually
from tests.workers import Worker, results, rows, running_worker

TASK = "inference.generate"

ANSWERS: dict[str, tuple[dict[str, Any], object]] = {
    # command: arguments, and the answer or a pattern that it holds
    "active": ({}, r"\[\]"),
    "active_queues": ({}, "gristmill.stub"),
    "add_consumer": ({"queue": "gristmill.stub"}, "ok.*add consumer"),
    "autoscale": ({"max": 10, "min": 1}, "error.*no autoscaling"),
    "cancel_consumer": ({"queue": "gristmill.stub-embed"}, "ok.*no longer consuming"),
    "clock": ({}, "clock"),
    "conf": ({}, "accept_content"),
    "disable_events": ({}, "ok.*task events"),
    "election": ({"id": "x", "topic": "none"}, "error.*no elections"),
    "enable_events": ({}, "ok.*task events"),
    "gristmill_readiness": ({}, "'ready': True"),
    "heartbeat": ({}, "None"),
    "hello": ({"from_node": "other@host", "revoked": None}, "clock"),
    "memdump": ({"samples": 1}, ""),
    "memsample": ({}, ""),
    "objgraph": ({}, "objgraph library"),
    "ping": ({}, "ok.*pong"),
    "pool_grow": ({"n": 1}, "error.*max_batch_size"),
    "pool_restart": ({}, "error.*SIGTERM"),
    "pool_shrink": ({"n": 1}, "error.*max_batch_size"),
    "query_task": ({"ids": ["x"]}, r"\{\}"),
    "rate_limit": ({"task_name": TASK, "rate_limit": "1/s"}, "error.*max_messages"),
    "registered": ({}, TASK),
    "report": ({}, "ok"),
    "reserved": ({}, r"\[\]"),
    "revoke": ({"task_id": "x"}, "ok.*flagged as revoked"),
    "revoke_by_stamped_headers": ({"headers": {"a": "b"}}, "ok"),
    "revoked": ({}, "x"),
    "scheduled": ({}, r"\[\]"),
    "stats": ({}, "worker_id"),
    "terminate": ({"task_id": "y", "signal": "TERM"}, "ok"),
    "time_limit": ({"task_name": TASK, "hard": 0.5}, "ok.*time limit set"),
}


@pytest.fixture
def worker(settings: Settings, tmp_path: Path) -> Iterator[Worker]:
    with running_worker(settings, tmp_path / "worker") as worker:
        yield worker


@pytest.fixture
def producer(settings: Settings) -> Iterator[Celery]:
    with Celery("service", broker=settings.broker.url, set_as_current=False) as app:
        yield app


@pytest.fixture
def ask(producer: Celery) -> Callable[..., object]:
    def ask(command: str, **arguments: Any) -> object:
        def answers() -> list[dict[str, Any]]:
            return producer.control.broadcast(  # type: ignore[no-any-return]
                command, arguments, reply=True, limit=1, timeout=5
            )

        [answer] = eventually(answers, 60)
        return next(iter(answer.values()))

    return ask


def test_every_command_of_celery_works_or_says_why_not(
    worker: Worker, ask: Callable[..., object], producer: Celery, settings: Settings
) -> None:
    ask("ping")  # it has begun to listen
    commands = sorted(Panel.data.keys() - {"shutdown", "dump_conf", "dump_revoked"})
    commands = [name for name in commands if Panel.meta.get(name)]  # not the aliases
    assert set(commands) <= ANSWERS.keys()
    assert REFUSED.keys() <= set(commands)

    answers = {name: str(ask(name, **arguments)) for name, (arguments, _) in ANSWERS.items()}

    assert not {
        name: answer
        for name, answer in answers.items()
        if not re.search(str(ANSWERS[name][1]), answer)
    }

    assert not worker.has_ended
    assert "Unrecoverable" not in worker.log

    # The time limit that was set holds for messages that bring none.
    late = producer.send_task(TASK, kwargs={"prompt": "x\nsleep 5000"})
    row = eventually(lambda: results(settings).get(late.id), 20)
    assert row["state"] == "failed"
    assert "limit" in str(row["error_code"])


def test_a_soft_time_limit_is_refused(worker: Worker, ask: Callable[..., object]) -> None:
    assert "no soft time limits" in str(ask("time_limit", task_name=TASK, hard=5, soft=3))


def test_shutdown_ends_a_worker_in_order(worker: Worker, producer: Celery) -> None:
    def asked() -> bool:
        producer.control.shutdown()
        return worker.has_ended

    eventually(asked, 30)

    assert worker.wait(1) == 0


def test_a_terminal_that_closes_ends_a_worker_in_order(
    worker: Worker, ask: Callable[..., object], producer: Celery, settings: Settings
) -> None:
    ask("ping")
    running = producer.send_task(TASK, kwargs={"prompt": "x\nsleep 1000"})
    eventually(lambda: rows(settings, "SELECT FROM jobs WHERE state = 'running'"))

    worker.send_signal(signal.SIGHUP)

    assert worker.wait(30) == 0
    assert results(settings)[running.id]["state"] == "completed"
    assert "Error" not in worker.log


def test_under_nohup_a_terminal_that_closes_changes_nothing(
    settings: Settings, tmp_path: Path, producer: Celery, ask: Callable[..., object]
) -> None:
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    with running_worker(settings, tmp_path / "worker", ignoring) as worker:
        ask("ping")

        worker.send_signal(signal.SIGHUP)

        sent = producer.send_task(TASK, kwargs={"prompt": "x"})
        eventually(lambda: results(settings).get(sent.id), 20)
        assert not worker.has_ended


def test_a_worker_that_is_to_scale_itself_does_not_start_and_says_why(settings: Settings) -> None:
    command = [sys.executable, "-m", "celery", "-A", "app.worker", "worker", "--autoscale=3,1"]
    urls = {
        "GRISTMILL_DATABASE__URL": settings.database.url,
        "GRISTMILL_BROKER__URL": settings.broker.url,
    }

    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=60, env=os.environ | urls
    )

    assert done.returncode == 1
    assert "--autoscale: There is no autoscaling" in done.stderr
