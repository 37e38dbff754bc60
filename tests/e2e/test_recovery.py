"""What dies is made good: a worker in the middle of a batch, and everything in Redis."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import redis

from app.config.settings import Settings
from app.local.ports import free_port
from gristmill_client import Client, JobEvent
from tests.apis import running_api
from tests.own_redis import running_redis
from tests.rescues import running_api_process, running_rescue
from tests.waiting import eventually
from tests.workers import results, rows, running_worker


@pytest.fixture
def settings(make_settings: Callable[..., Settings], database_url: str, redis_url: str) -> Settings:
    """Short leases and small batches, so that dying and mending take seconds."""
    return make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        worker={"lease_s": 2, "heartbeat_s": 0.5},
        rescue={"sweep_ms": 200, "lost_after_s": 1},
        models={
            "stub": {
                "source": "stub",
                "engine": "stub",
                "kind": "generate",
                "default": True,
                "max_batch_size": 8,
            }
        },
    )


@pytest.fixture
def api(settings: Settings) -> Iterator[httpx.Client]:
    with running_api(settings) as api:
        yield api


def submit(api: httpx.Client, prompts: list[str]) -> list[str]:
    ids = []
    for prompt in prompts:
        answer = api.post("/v1/jobs", json={"body": {"prompt": prompt}}).raise_for_status()
        ids.append(answer.json()["id"])
    return ids


def test_a_worker_that_is_killed_in_the_middle_of_a_batch_loses_no_job(
    settings: Settings, api: httpx.Client, tmp_path: Path
) -> None:
    # given a worker with jobs that run, jobs that it received, and jobs in Redis
    with running_worker(settings, tmp_path / "first") as worker:
        ids = submit(api, [f"prompt {n}\nsleep 400" for n in range(40)])
        eventually(lambda: rows(settings, "SELECT id FROM jobs WHERE state = 'running'"))
        worker.kill()

    # when another one takes its place
    with (
        running_rescue(settings, tmp_path / "rescue"),
        running_worker(settings, tmp_path / "second"),
    ):
        found = eventually(lambda: (all_ := results(settings)).keys() >= set(ids) and all_, 60)

    # then every job has its one answer, and the lost attempts are on record
    assert {row["state"] for row in found.values()} == {"completed"}
    assert len(rows(settings, "SELECT job_id FROM results")) == 40
    lost = rows(settings, "SELECT charged, device_ns FROM attempts WHERE outcome = 'lost'")
    assert lost
    assert not any(attempt["charged"] for attempt in lost)


def test_redis_losing_everything_loses_no_job(
    settings: Settings, api: httpx.Client, tmp_path: Path, redis_url: str
) -> None:
    ids = submit(api, [f"prompt {n}" for n in range(100)])
    with redis.Redis.from_url(redis_url) as client:
        assert client.llen("gristmill.stub") == 100
        client.flushdb()

    with (
        running_rescue(settings, tmp_path / "rescue"),
        running_worker(settings, tmp_path / "worker"),
    ):
        found = eventually(lambda: (all_ := results(settings)).keys() >= set(ids) and all_, 60)

    assert {row["state"] for row in found.values()} == {"completed"}
    assert len(rows(settings, "SELECT id FROM attempts")) == 100


def test_redis_losing_everything_under_a_running_worker_loses_no_job(
    settings: Settings, api: httpx.Client, tmp_path: Path, redis_url: str
) -> None:
    with (
        running_rescue(settings, tmp_path / "rescue"),
        running_worker(settings, tmp_path / "worker"),
        redis.Redis.from_url(redis_url) as client,
    ):
        ids = submit(api, [f"prompt {n}\nsleep 100" for n in range(60)])
        eventually(lambda: rows(settings, "SELECT id FROM jobs WHERE state = 'running'"))
        client.flushdb()

        found = eventually(lambda: (all_ := results(settings)).keys() >= set(ids) and all_, 60)

    assert {row["state"] for row in found.values()} == {"completed"}


@pytest.mark.parametrize("number", [4, 60], ids=["fewer than it holds", "more than it holds"])
def test_a_redis_that_restarts_empty_neither_ends_the_worker_nor_loses_a_job(
    settings: Settings, tmp_path: Path, number: int
) -> None:
    with running_redis(tmp_path) as own_redis:
        settings = settings.model_copy(
            update={"broker": settings.broker.model_copy(update={"url": own_redis.url})}
        )
        with (
            running_api(settings) as api,
            running_rescue(settings, tmp_path / "rescue"),
            running_worker(settings, tmp_path / "worker") as worker,
        ):
            ids = submit(api, [f"prompt {n}\nsleep 500" for n in range(number)])
            eventually(lambda: rows(settings, "SELECT id FROM jobs WHERE state = 'running'"))
            own_redis.stop()
            ids += submit(api, ["sent while Redis is away"])
            own_redis.start()

            found = eventually(lambda: (all_ := results(settings)).keys() >= set(ids) and all_, 60)
            assert worker.log.count("Unrecoverable error") == 0

    assert {row["state"] for row in found.values()} == {"completed"}
    assert len(rows(settings, "SELECT id FROM workers")) == 1


def test_a_stream_goes_on_through_a_killed_api_and_a_killed_worker(
    make_settings: Callable[..., Settings], settings: Settings, tmp_path: Path
) -> None:
    stub = settings.models["stub"].model_copy(
        update={"options": {"step_ms": 30, "joins": True}, "default_max_tokens": 400}
    )
    settings = settings.model_copy(
        update={
            "models": {"stub": stub},
            "api": settings.api.model_copy(update={"port": free_port()}),
        }
    )
    text, had = "the mill by the water " * 12, list[JobEvent]()
    url = f"http://127.0.0.1:{settings.api.port}"

    def listen(job_id: str) -> None:
        with Client(url) as gristmill:
            for each in gristmill.stream(job_id):
                had.append(each)

    def has_more(than: int) -> Callable[[], bool]:
        return lambda: len(had) > than + 10

    with (
        running_rescue(settings, tmp_path / "rescue"),
        Client(url) as gristmill,
        running_worker(settings, tmp_path / "first") as worker,
    ):
        with running_api_process(settings, tmp_path / "api"):
            job_id = gristmill.submit({"prompt": text}, stream_events=True)
            listener = threading.Thread(target=listen, args=(job_id,))
            listener.start()
            eventually(has_more(0), 60)
        # the API is killed, and then, while its next one tells, the worker
        with running_api_process(settings, tmp_path / "api"):
            eventually(has_more(len(had)), 60)
            assert "restarted" not in {each.event for each in had}
            worker.kill()
            with running_worker(settings, tmp_path / "second"):
                listener.join(60)

    told = [each for each in had if each.event in ("started", "tokens", "restarted")]
    again = next(at for at, each in enumerate(told) if each.event == "restarted")
    assert [each.id for each in told[:again]] == [f"1-{n}" for n in range(again)]
    assert [each.id for each in told[again:]] == [f"2-{n}" for n in range(len(told) - again)]
    assert had[-1].data["complete"] and had[-1].job is not None
    assert "".join(each.text for each in told[again:]) == text
    assert had[-1].job.response is not None
    assert had[-1].job.response["choices"][0]["text"] == text
    assert len(rows(settings, "SELECT job_id FROM results")) == 1
