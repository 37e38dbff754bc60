"""Log lines are for people or machines, and never show what a message holds."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest
from celery.concurrency import base as pool
from celery.worker import strategy
from celery.worker.consumer import consumer
from kombu.transport import redis as kombu_redis

from app import telemetry

PROMPT = "the miller's secret"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What this process logs; the loggers are put back as they were."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    names = [*telemetry._TALKATIVE, telemetry._LINE_A_JOB]
    levels = {name: logging.getLogger(name).level for name in names}
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    monkeypatch.delenv("GRISTMILL_LOG_FORMAT", raising=False)
    telemetry.setup_logging("DEBUG")
    yield written
    root.handlers[:], root.level = handlers, level
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


DUMPS = {
    "unknown message": (consumer.logger, consumer.UNKNOWN_FORMAT, 1),
    "unknown task": (consumer.logger, consumer.UNKNOWN_TASK_ERROR, 4),
    "invalid task": (consumer.logger, consumer.INVALID_TASK_ERROR, 2),
    "undecodable body": (consumer.logger, consumer.MESSAGE_DECODE_ERROR, 5),
    "wrong eta": (strategy.logger, "Couldn't convert ETA %r to timestamp: %r. Task: %r", 3),
    "arguments of a task": (pool.logger, "TaskPool: Apply %s (args:%s kwargs:%s)", 3),
    "not put back": (kombu_redis.logger, "Could not restore message: %r", 1),
    "odd event": (kombu_redis.logger, "Cannot process event on channel %r: %s", 2),
}


@pytest.mark.parametrize(("logger", "template", "num_args"), DUMPS.values(), ids=DUMPS)
def test_a_dump_of_a_message_loses_its_contents(
    log: io.StringIO, logger: logging.Logger, template: str, num_args: int
) -> None:
    try:
        raise ValueError(PROMPT)
    except ValueError:
        logger.error(template, *[PROMPT] * num_args, exc_info=True)

    assert PROMPT not in log.getvalue()
    assert template.split("%")[0].split("\n")[0].strip() in log.getvalue()
    assert "[contents left out]" in log.getvalue()


def test_the_pool_does_not_print_arguments_even_at_debug(log: io.StringIO) -> None:
    assert not pool.logger.isEnabledFor(logging.DEBUG)


def test_other_lines_of_celery_stay_whole(log: io.StringIO) -> None:
    consumer.logger.error(
        consumer.CONNECTION_ERROR, "redis://127.0.0.1:6379//", "refused", "Trying again"
    )

    assert "Cannot connect to redis://127.0.0.1:6379//: refused" in log.getvalue()


@pytest.mark.parametrize(("level", "is_told"), [("DEBUG", True), ("INFO", False)])
def test_that_a_message_came_is_told_at_debug_alone(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch, level: str, is_told: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", log)
    telemetry.setup_logging(level)

    strategy.logger.info("Task %(name)s[%(id)s] received", {"name": "generate", "id": "1"})
    strategy.logger.warning("Something is wrong.")

    assert ("received" in log.getvalue()) is is_told
    assert "wrong" in log.getvalue()


def test_extra_fields_end_the_line(log: io.StringIO) -> None:
    logging.getLogger("app.rescue").info("Sent again.", extra={"model": "small", "jobs": 3})

    [line] = log.getvalue().splitlines()
    assert line.endswith("INFO    app.rescue: Sent again. model=small jobs=3")
    assert line[19] == "." and line[23] == "Z"  # UTC, with milliseconds


def test_json_lines_hold_the_fields_and_the_traceback(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRISTMILL_LOG_FORMAT", "json")
    monkeypatch.setattr(sys, "stderr", log)
    telemetry.setup_logging("INFO")

    try:
        raise OSError("gone")
    except OSError:
        logging.getLogger("app.rescue").exception("Failed.", extra={"jobs": 3})

    [line] = log.getvalue().splitlines()
    fields = json.loads(line)
    assert fields["level"] == "ERROR"
    assert fields["message"] == "Failed."
    assert fields["jobs"] == 3
    assert "OSError: gone" in fields["traceback"]


def test_a_warning_that_is_met_again_and_again_is_one_line_in_a_while(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000.0
    monkeypatch.setattr("app.telemetry.time.monotonic", lambda: now)
    quiet = telemetry.say_once(logging.getLogger("app.outage"))
    for _ in range(3):
        quiet.warning("Redis refuses: %s.", "READONLY")
        quiet.warning("Redis refuses: %s.", "MISCONF")
        quiet.info("a job")
    assert log.getvalue().count("READONLY") == 1
    assert log.getvalue().count("MISCONF") == 1
    assert log.getvalue().count("a job") == 3

    now += telemetry.QUIET_S
    quiet.warning("Redis refuses: %s.", "READONLY")

    assert log.getvalue().count("READONLY") == 2
