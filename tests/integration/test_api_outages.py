"""Postgres or Redis away, and the process itself: start, refusal, end."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import redis

from app import sender
from app.api.app import serve
from app.broker import queue_name
from app.config import Settings
from app.errors import ConfigError, SchemaError
from app.local import EmbeddedPostgres, EmbeddedRedis
from app.store.database import migrate
from tests.apis import Hands, running_api
from tests.waiting import eventually
from tests.workers import rows

JOB = {"body": {"prompt": "A grist mill is"}}
NOWHERE = "127.0.0.1:1"  # nobody listens on this port


def metric(api: httpx.Client, name: str) -> float:
    [line] = [each for each in api.get("/metrics").text.splitlines() if each.startswith(name + " ")]
    return float(line.rpartition(" ")[2])


# ── Redis ───────────────────────────────────────────────────────────────────────────────────────


def test_without_redis_jobs_are_accepted_and_left_to_rescue(
    make_settings: Callable[..., Settings], database_url: str
) -> None:
    settings = make_settings(database={"url": database_url}, broker={"url": f"redis://{NOWHERE}"})
    with running_api(settings) as api:
        for _ in range(3):
            assert api.post("/v1/jobs", json=JOB).status_code == 202
        assert api.post("/v1/jobs/bulk", json={"jobs": [JOB] * 3}).json()["accepted"] == 3

        ready = api.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
        assert not ready.json()["checks"]["redis"]["ok"]
        assert metric(api, "gristmill_redis_up") == 0
        assert metric(api, 'gristmill_messages_total{outcome="left_to_rescue"}') == 6
    assert [row["enqueued_at"] for row in rows(settings, "SELECT enqueued_at FROM jobs")] == (
        [None] * 6
    )


def test_a_redis_that_accepts_and_never_answers_does_not_keep_a_submission(
    make_settings: Callable[..., Settings], database_url: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        settings = make_settings(
            database={"url": database_url}, broker={"url": url, "publish_timeout_s": 0.2}
        )
        with running_api(settings) as api:
            for _ in range(3):
                assert api.post("/v1/jobs", json=JOB).status_code == 202


def test_when_redis_is_back_messages_are_sent_again(
    make_settings: Callable[..., Settings],
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sender, "BREAK_S", 0.05)
    with EmbeddedRedis(tmp_path / "redis") as server:
        settings = make_settings(
            database={"url": database_url},
            broker={"url": server.url, "publish_timeout_s": 0.5},
        )
        with running_api(settings) as api:
            server.stop()
            assert api.post("/v1/jobs", json=JOB).status_code == 202
            server.start()

            def one_more_is_sent() -> bool:
                assert api.post("/v1/jobs", json=JOB).status_code == 202
                with redis.Redis.from_url(server.url) as client:
                    return client.llen(queue_name("stub")) > 0

            eventually(one_more_is_sent)


# ── Postgres ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(autouse=True)
def no_logging_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` sets up the logging of a whole process, and this one is the tests'."""
    monkeypatch.setattr("app.telemetry.setup_logging", lambda level: None)


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(tmp_path / "postgres", durable=False) as server:
        migrate(server.url)
        yield server


def test_without_postgres_nothing_is_accepted_and_with_it_all_goes_on(
    make_settings: Callable[..., Settings], redis_url: str, postgres: EmbeddedPostgres
) -> None:
    settings = make_settings(database={"url": postgres.url}, broker={"url": redis_url})
    with running_api(settings) as api:
        job_id = api.post("/v1/jobs", json=JOB).json()["id"]
        postgres.stop()

        for answer in (
            api.post("/v1/jobs", json=JOB),
            api.post("/v1/jobs/bulk", json={"jobs": [JOB]}),
            api.get(f"/v1/jobs/{job_id}"),
            api.get("/v1/jobs"),
            api.post(f"/v1/jobs/{job_id}/cancel"),
        ):
            assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
            assert answer.headers["content-type"] == "application/problem+json"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert api.get("/healthz").status_code == 200
        ready = api.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
        assert not ready.json()["checks"]["postgres"]["ok"]
        assert metric(api, "gristmill_postgres_up") == 0

        postgres.start()

        eventually(lambda: api.get("/readyz").status_code == 200)
        assert api.post("/v1/jobs", json=JOB).status_code == 202
        hands = Hands(postgres.url)
        claimed = hands.claim(job_id)
        with ThreadPoolExecutor() as pool:
            following = pool.submit(api.get, f"/v1/jobs/{job_id}", params={"wait": 30})
            eventually(lambda: metric(api, "gristmill_long_polls") == 1)
            hands.finish(claimed)
            assert following.result(timeout=20).json()["state"] == "completed"
        hands.close()


def test_a_database_without_the_schema_is_not_ready_and_says_what_to_run(
    make_settings: Callable[..., Settings], empty_database_url: str, redis_url: str
) -> None:
    settings = make_settings(database={"url": empty_database_url}, broker={"url": redis_url})
    with running_api(settings) as api:
        ready = api.get("/readyz")
        assert ready.status_code == 503
        assert "gristmill migrate" in ready.json()["checks"]["schema"]["detail"]
        assert api.post("/v1/jobs", json=JOB).status_code == 503
    with pytest.raises(SchemaError, match="gristmill migrate"):
        serve(settings)


# ── clients ─────────────────────────────────────────────────────────────────────────────────────


def test_a_client_that_is_gone_before_its_body_is_no_fault_of_ours(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    with running_api(settings) as api:
        with socket.create_connection(("127.0.0.1", api.base_url.port or 0)) as client:
            client.sendall(
                b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b'Content-Length: 1000\r\n\r\n{"body"'
            )
        eventually(lambda: 'status="499"' in api.get("/metrics").text)
    assert "was not caught" not in caplog.text


# ── the process ─────────────────────────────────────────────────────────────────────────────────


def test_a_port_that_is_taken_is_a_wrong_setting(
    make_settings: Callable[..., Settings], database_url: str, redis_url: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = make_settings(
            database={"url": database_url},
            broker={"url": redis_url},
            api={"port": taken.getsockname()[1]},
        )
        with pytest.raises(ConfigError, match="cannot listen there"):
            serve(settings)


def test_the_process_tells_its_port_and_ends_at_a_signal(
    settings: Settings, tmp_path: Path
) -> None:
    file = tmp_path / "settings.json"
    file.write_text(settings.model_dump_json())
    code = (
        "import sys, pathlib; from app.api.app import serve; from app.config import Settings;"
        "serve(Settings.model_validate_json(pathlib.Path(sys.argv[1]).read_text()))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(file)], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            url = _address(process)
            answer = httpx.post(f"{url}/v1/jobs", json=JOB, timeout=30)
            assert answer.status_code == 202
            with ThreadPoolExecutor() as pool:
                path = f"{url}{answer.headers['location']}?wait=50"
                following = pool.submit(httpx.get, path, timeout=60)
                eventually(
                    lambda: (
                        "gristmill_long_polls 1.0" in httpx.get(f"{url}/metrics", timeout=30).text
                    )
                )

                process.send_signal(signal.SIGTERM)

                assert following.result(timeout=20).json()["state"] == "queued"
            process.wait(timeout=20)
        finally:
            process.kill()


def _address(process: subprocess.Popen[str]) -> str:
    """The address that the process logs when it listens."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            return found[0]
    raise AssertionError("the process ended without an address")
