"""Flower shows each job under its id: its state, its batch and its device time, never a prompt."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from celery import Celery

from app.broker.commands import flower_command
from app.config.settings import Settings
from app.local.ports import free_port
from tests.waiting import eventually
from tests.workers import Worker, running_worker

PROMPT = "the miller's secret"


@pytest.fixture
def settings(make_settings: Callable[..., Settings], database_url: str, redis_url: str) -> Settings:
    return make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        flower={"port": free_port()},
    )


@pytest.fixture
def worker(settings: Settings, tmp_path: Path) -> Iterator[Worker]:
    with running_worker(settings, tmp_path / "worker") as worker:
        yield worker


@dataclass
class Flower:
    http: httpx.Client

    def task(self, job_id: str) -> dict[str, Any] | None:
        """The job as Flower's own API tells it, once it has ended."""
        answer = self.http.get(f"/api/task/info/{job_id}")
        if answer.status_code == 404:
            return None
        task: dict[str, Any] = answer.raise_for_status().json()
        return task if task["state"] in ("SUCCESS", "FAILURE") else None


@pytest.fixture
def flower(settings: Settings, worker: Worker, tmp_path: Path) -> Iterator[Flower]:
    command, environment = flower_command(settings)
    environment |= {
        "GRISTMILL_DATABASE__URL": settings.database.url,
        "GRISTMILL_BROKER__URL": settings.broker.url,
    }
    with (
        (tmp_path / "flower.log").open("wb") as log,
        subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{settings.flower.port}") as http,
    ):
        try:
            eventually(lambda: _knows_the_worker(http), timeout_s=30)
            yield Flower(http)
        finally:
            process.terminate()


def _knows_the_worker(http: httpx.Client) -> bool:
    try:
        return bool(http.get("/api/workers?status=true").raise_for_status().json())
    except httpx.TransportError:
        return False


def test_a_finished_and_a_failed_job_can_be_read_from_flower_without_their_prompts(
    settings: Settings, flower: Flower
) -> None:
    with Celery("a-service", broker=settings.broker.url, set_as_current=False) as service:
        good, bad = (
            service.send_task("inference.generate", kwargs={"prompt": prompt}).id
            for prompt in (PROMPT, f"{PROMPT}\nnan")
        )

    finished = eventually(lambda: flower.task(good), timeout_s=30)
    failed = eventually(lambda: flower.task(bad), timeout_s=30)

    assert (finished["state"], failed["state"]) == ("SUCCESS", "FAILURE")
    assert finished["name"] == "inference.generate"
    assert finished["kwargs"] == "(model=stub)"
    assert finished["runtime"] > 0
    assert "batch" in finished["result"]
    tasks = flower.http.get("/api/tasks").raise_for_status()
    assert tasks.json().keys() >= {good, bad}
    assert PROMPT not in tasks.text
    for page in ("/tasks", f"/task/{good}", f"/task/{bad}", "/metrics"):
        assert PROMPT not in flower.http.get(page).raise_for_status().text


def test_flower_lets_nobody_change_anything(flower: Flower) -> None:
    [worker_name] = flower.http.get("/api/workers?status=true").raise_for_status().json()

    for path in (
        f"/api/worker/shutdown/{worker_name}",
        "/api/task/send-task/inference.generate",
        "/api/task/revoke/some-id",
    ):
        assert flower.http.post(path, json={}).status_code == 403


def test_flower_answers_no_page_of_another_origin_and_no_name_but_its_own(flower: Flower) -> None:
    foreign = (
        {"Host": "evil.example"},  # a name that leads here
        {"Origin": "http://evil.example"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    )

    for path in ("/api/workers", "/api/tasks", "/tasks", "/metrics", "/healthcheck"):
        for headers in foreign:
            answer = flower.http.get(path, headers=headers)

            assert answer.status_code in (403, 421)
            assert "flower.allowed_hosts" in answer.text
        headers = flower.http.get(path).raise_for_status().headers
        assert "access-control-allow-origin" not in headers
        assert headers["cross-origin-resource-policy"] == "same-origin"
