"""Whatever is pushed into Redis: the worker goes on, and says why where an id can be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import redis

from app.broker.message import raw_message
from app.config.settings import Settings
from app.jobs import Kind
from app.worker.pool import envelope
from tests.bad_messages import NAMELESS, ODD, PROMPT, UNPARSABLE, UNRUNNABLE
from tests.waiting import eventually
from tests.workers import Worker, results, rows, running_worker


@pytest.fixture
def config(make_settings: Callable[..., Settings], database_url: str, redis_url: str) -> Settings:
    return make_settings(database={"url": database_url}, broker={"url": redis_url})


@pytest.fixture
def worker(config: Settings, tmp_path: Path) -> Iterator[Worker]:
    with running_worker(config, tmp_path / "worker") as worker:
        yield worker


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def test_what_is_odd_and_harmless_is_answered_as_any_other(
    config: Settings, worker: Worker, client: redis.Redis
) -> None:
    client.lpush("celery", *ODD.values())

    named = {task_id for item in ODD.values() if (task_id := envelope.task_id_in(item))}
    assert len(named) == len(ODD)
    found = eventually(lambda: (all_ := results(config)).keys() >= named and all_, 60)
    assert {found[id_]["state"] for id_ in named} == {"completed"}
    eventually(lambda: client.hlen("unacked") == 0)


def test_no_message_ends_or_blocks_the_worker_and_the_named_ones_fail_with_a_reason(
    config: Settings, worker: Worker, client: redis.Redis
) -> None:
    # given every bad message there is, each followed by a good one
    bad = {**UNPARSABLE, **UNRUNNABLE, **NAMELESS}
    good = []
    for item in bad.values():
        good.append(str(uuid4()))
        follower = raw_message(good[-1], Kind.GENERATE, {"prompt": "flour"}, queue="celery")
        client.lpush("celery", item, follower)

    # then every good one is answered by the same process
    found = eventually(lambda: (all_ := results(config)).keys() >= set(good) and all_, 60)
    assert {found[id_]["state"] for id_ in good} == {"completed"}
    assert len(rows(config, "SELECT id FROM workers")) == 1

    # and every bad one that has a name has failed, with its reason and without its prompt
    named = {task_id for item in bad.values() if (task_id := envelope.task_id_in(item))}
    failed = eventually(lambda: (all_ := results(config)).keys() >= named and all_)
    for task_id in named:
        assert failed[task_id]["state"] == "failed"
        assert failed[task_id]["error_message"]
        assert PROMPT not in str(failed[task_id])
    assert len(failed) == len(named) + len(good)

    # and nothing is left in Redis, and no prompt in the log
    eventually(lambda: not client.llen("celery") and not client.hlen("unacked"))
    assert PROMPT not in worker.log


def test_a_message_of_100_megabytes_fails_with_a_reason_and_the_next_one_is_answered(
    config: Settings, worker: Worker, client: redis.Redis
) -> None:
    huge, next_ = str(uuid4()), str(uuid4())

    for task_id, prompt in ((huge, "x" * 100_000_000), (next_, "x")):
        item = raw_message(task_id, Kind.GENERATE, {"prompt": prompt}, queue="celery")
        client.lpush("celery", item)

    found = eventually(lambda: (all_ := results(config)).keys() >= {huge, next_} and all_, 60)
    assert (found[huge]["state"], found[huge]["error_code"]) == ("failed", "request_too_large")
    assert found[next_]["state"] == "completed"


def test_a_bad_message_does_not_touch_a_job_that_exists(
    config: Settings, worker: Worker, client: redis.Redis
) -> None:
    task_id, next_ = str(uuid4()), str(uuid4())
    good = raw_message(task_id, Kind.GENERATE, {"prompt": "flour"}, queue="celery")
    client.lpush("celery", good)
    before = eventually(lambda: results(config).get(task_id))

    client.lpush("celery", good.replace(b"delivery_tag", b"tag"))
    client.lpush("celery", raw_message(next_, Kind.GENERATE, {"prompt": "x"}, queue="celery"))

    found = eventually(lambda: (all_ := results(config)).keys() >= {next_} and all_)
    assert found[task_id] == before
