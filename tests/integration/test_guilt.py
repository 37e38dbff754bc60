"""What kills an engine process or a worker harms itself alone, on real processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery import Celery

from app.bench.poison import max_runs
from app.config.settings import Settings
from app.jobs import ALONE_AFTER
from tests.rescues import running_rescue
from tests.waiting import eventually
from tests.workers import Worker, results, rows, running_worker

BATCH = 64


@pytest.fixture
def config(make_settings: Callable[..., Settings], database_url: str, redis_url: str) -> Settings:
    stub = {
        "source": "stub",
        "kind": "generate",
        "engine": "stub",
        "default": True,
        "max_batch_size": BATCH,
        "max_wait_ms": 1_000,
        "options": {"step_ms": 1},
    }
    return make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        worker={"lease_s": 2, "heartbeat_s": 0.5, "max_attempts": 1},
        rescue={"sweep_ms": 100, "lost_after_s": 1},
        models={"stub": stub},
    )


def send(producer: Celery, prompts: list[str]) -> list[str]:
    return [
        str(producer.send_task("inference.generate", kwargs={"prompt": prompt}).id)
        for prompt in prompts
    ]


def ended(config: Settings, ids: list[str], timeout_s: float = 90) -> dict[str, dict[str, Any]]:
    found = eventually(lambda: (all_ := results(config)).keys() >= set(ids) and all_, timeout_s)
    return {id_: found[id_] for id_ in ids}


def engine_pid(worker: Worker) -> int:
    """Of the engine process: the worker's only child."""

    children = eventually(lambda: psutil.Process(worker.pid).children())
    return int(children[0].pid)


@pytest.mark.parametrize(
    "number", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_the_failed_are_exactly_the_poisons_among_64(
    config: Settings, producer: Celery, tmp_path: Path, number: int
) -> None:
    # given a batch of 64 with some poisons in it
    prompts = [f"good {n}" for n in range(BATCH)]
    poisons = {place * 11 + 3 for place in range(number)}
    for place in poisons:
        prompts[place] = "crash"

    # when it runs
    ids = send(producer, prompts)
    with running_worker(config, tmp_path / "worker") as worker:
        found = ended(config, ids)
        runs = 1 + worker.log.count("suspects apart")

    # then each poison says how it was found, nobody else is charged, and it took few runs
    assert {place for place, id_ in enumerate(ids) if found[id_]["state"] == "failed"} == poisons
    for place in poisons:
        assert found[ids[place]]["error_code"] == "engine_crash"
        assert "exit status 70" in found[ids[place]]["error_message"]
    attempts = rows(config, "SELECT * FROM attempts")
    assert len(attempts) == BATCH
    assert {each["outcome"] for each in attempts} == {"succeeded", "failed"}
    assert runs <= max_runs(number)


def test_an_engine_process_that_somebody_kills_costs_no_job(
    config: Settings, producer: Celery, tmp_path: Path
) -> None:
    [id_] = send(producer, ["mine\nsleep 2000"])
    with running_worker(config, tmp_path / "worker") as worker:
        for times in (1, 2):
            eventually(lambda: rows(config, "SELECT FROM jobs WHERE state = 'running'"))
            os.kill(engine_pid(worker), signal.SIGKILL)
            eventually(lambda times=times: worker.log.count("engine process is lost") == times)

        assert ended(config, [id_])[id_]["state"] == "completed"


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="Linux alone has it")
def test_a_host_without_memory_kills_the_engine_process_and_not_the_worker(
    config: Settings, tmp_path: Path
) -> None:
    with running_worker(config, tmp_path / "worker") as worker:
        pids = (engine_pid(worker), worker.pid)

        engine, parent = (int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in pids)

        assert engine >= parent + 500


def test_an_idle_engine_process_that_is_killed_is_replaced(
    config: Settings, producer: Celery, tmp_path: Path
) -> None:
    with running_worker(config, tmp_path / "worker") as worker:
        os.kill(engine_pid(worker), signal.SIGKILL)

        [id_] = send(producer, ["after"])

        assert ended(config, [id_])[id_]["state"] == "completed"
        assert len(rows(config, "SELECT id FROM workers")) == 1


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_prompt_that_kills_whole_workers_fails_and_its_mates_complete_uncharged(
    config: Settings, producer: Celery, tmp_path: Path
) -> None:
    # given a poison that kills the worker, among ten good prompts
    ids = send(producer, ["kill", *(f"good {n}" for n in range(10))])

    # when workers are started again whenever one has died
    deaths = 0
    with running_rescue(config, tmp_path / "rescue"):
        worker = Worker(config, tmp_path / "worker").start()
        try:
            while len(results(config)) < len(ids):
                eventually(lambda: worker.has_ended or len(results(config)) == len(ids), 60)
                if worker.has_ended:
                    deaths += 1
                    worker.start()
        finally:
            worker.kill()

    # then only the poison failed, after it was lost alone
    found = ended(config, ids)
    assert [id_ for id_ in ids if found[id_]["state"] == "failed"] == [ids[0]]
    assert found[ids[0]]["error_code"] == "worker_lost"
    charged = rows(config, "SELECT * FROM attempts WHERE charged AND outcome = 'lost'")
    assert [str(each["job_id"]) for each in charged] == [ids[0]]
    assert deaths == ALONE_AFTER + config.worker.max_attempts
