"""Postgres or Redis away, and the process itself: start, refusal, end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import psycopg
import pytest
import redis

from app.api import services
from app.api.app import serve
from app.broker.queues import queue_name
from app.config.settings import Settings
from app.errors import ConfigError, SchemaError
from app.intake import sender
from app.local.servers import EmbeddedPostgres, EmbeddedRedis
from app.store.migration import migrate
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


def test_a_redis_that_accepts_and_never_answers_keeps_no_submission_and_few_connections_are_tried(
    make_settings: Callable[..., Settings], database_url: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        settings = make_settings(
            database={"url": database_url}, broker={"url": url, "publish_timeout_s": 0.2}
        )
        with running_api(settings) as api, ThreadPoolExecutor(16) as clients:
            answers = clients.map(lambda _: api.post("/v1/jobs", json=JOB, timeout=60), range(64))
            assert {answer.status_code for answer in answers} == {202}
            assert api.get("/readyz").json()["status"] == "degraded"
        silent.setblocking(False)
        tried = 0
        with suppress(BlockingIOError):
            while True:
                silent.accept()[0].close()
                tried += 1
        assert 1 <= tried <= 10  # each try stays with a server that is frozen


def test_a_redis_that_is_frozen_does_not_keep_submissions_and_is_used_again_when_it_thaws(
    make_settings: Callable[..., Settings],
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sender, "BREAK_S", 0.2)
    with EmbeddedRedis(tmp_path / "redis") as server:
        settings = make_settings(
            database={"url": database_url},
            broker={"url": server.url, "publish_timeout_s": 0.5},
        )
        assert server.pid is not None
        with running_api(settings) as api:
            assert api.post("/v1/jobs", json=JOB).status_code == 202
            os.kill(server.pid, signal.SIGSTOP)
            try:
                for _ in range(3):
                    assert api.post("/v1/jobs", json=JOB, timeout=30).status_code == 202
            finally:
                os.kill(server.pid, signal.SIGCONT)

            sent = 'gristmill_messages_total{outcome="sent"}'
            before = metric(api, sent)

            def one_more_is_sent() -> bool:
                assert api.post("/v1/jobs", json=JOB).status_code == 202
                return metric(api, sent) > before

            eventually(one_more_is_sent)


def test_a_full_redis_takes_no_message_and_every_job_is_accepted(
    make_settings: Callable[..., Settings],
    database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sender, "BREAK_S", 0.05)
    with (
        EmbeddedRedis(tmp_path / "redis") as server,
        redis.Redis.from_url(server.url) as client,
    ):
        settings = make_settings(database={"url": database_url}, broker={"url": server.url})
        with running_api(settings) as api:
            client.config_set("maxmemory", 1)
            for _ in range(3):
                assert api.post("/v1/jobs", json=JOB).status_code == 202
            unsent = "SELECT id FROM jobs WHERE enqueued_at IS NULL"
            eventually(lambda: len(rows(settings, unsent)) == 3)
            assert client.llen(queue_name("stub")) == 0

            client.config_set("maxmemory", 0)

            def one_more_is_sent() -> bool:
                assert api.post("/v1/jobs", json=JOB).status_code == 202
                return client.llen(queue_name("stub")) > 0

            eventually(one_more_is_sent)
        assert len(rows(settings, unsent)) >= 3


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


def refused_for_now(answer: httpx.Response) -> bool:
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable"), answer.text
    return 1 <= int(answer.headers["retry-after"]) <= 60


@pytest.fixture
def impatient(
    make_settings: Callable[..., Settings], database_url: str, redis_url: str
) -> Settings:
    """Settings that give up on Postgres soon."""
    short = {"statement_timeout_ms": 1_000, "lock_timeout_ms": 300, "connect_timeout_s": 1}
    return make_settings(
        database={"url": database_url, "pool_size": 4} | short, broker={"url": redis_url}
    )


def test_while_somebody_holds_the_table_the_answer_is_to_try_again_and_no_job_is_left(
    impatient: Settings,
) -> None:
    with running_api(impatient) as api:
        with psycopg.connect(impatient.database.url) as locking:
            locking.execute("LOCK TABLE open_jobs IN ACCESS EXCLUSIVE MODE")

            assert refused_for_now(api.post("/v1/jobs", json=JOB))
            assert refused_for_now(api.post("/v1/jobs/bulk", json={"jobs": [JOB] * 3}))
            assert refused_for_now(api.get("/v1/jobs"))
            locking.rollback()

        assert rows(impatient, "SELECT id FROM jobs") == []
        assert api.post("/v1/jobs", json=JOB).status_code == 202


def test_more_requests_than_a_stuck_database_has_connections_are_all_answered(
    impatient: Settings,
) -> None:
    with running_api(impatient) as api, ThreadPoolExecutor(12) as pool:
        with psycopg.connect(impatient.database.url) as locking:
            locking.execute("LOCK TABLE open_jobs IN ACCESS EXCLUSIVE MODE")
            stuck = [pool.submit(api.post, "/v1/jobs", json=JOB) for _ in range(12)]

            assert all(refused_for_now(each.result(timeout=60)) for each in stuck)
            locking.rollback()

        assert api.post("/v1/jobs", json=JOB).status_code == 202
        assert len(rows(impatient, "SELECT id FROM jobs")) == 1


def test_a_frozen_postgres_is_answered_for_in_bounded_time_and_goes_on_when_it_thaws(
    make_settings: Callable[..., Settings],
    redis_url: str,
    postgres: EmbeddedPostgres,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(services, "SPARE_S", 0.5)
    short = {"statement_timeout_ms": 500, "connect_timeout_s": 1, "pool_size": 2}
    settings = make_settings(database={"url": postgres.url} | short, broker={"url": redis_url})
    with running_api(settings) as api:
        assert api.post("/v1/jobs", json=JOB).status_code == 202
        assert postgres.pid is not None
        frozen = [psutil.Process(postgres.pid)]
        frozen += frozen[0].children(recursive=True)
        try:
            for process in frozen:
                process.suspend()
            keyed = JOB | {"idempotency_key": "in the cold"}
            for _ in range(4):  # more than there are connections
                assert refused_for_now(api.post("/v1/jobs", json=keyed, timeout=60))
            assert api.get("/healthz").status_code == 200
        finally:
            for process in frozen:
                process.resume()

        eventually(lambda: api.post("/v1/jobs", json=keyed).status_code in (200, 202))
        assert len(rows(settings, "SELECT id FROM jobs")) == 2


def test_connections_that_are_ended_under_the_api_cost_a_refusal_at_most(
    impatient: Settings,
) -> None:
    with running_api(impatient) as api:
        accepted = {api.post("/v1/jobs", json=JOB).json()["id"]}
        for _ in range(5):
            with psycopg.connect(impatient.database.url, autocommit=True) as admin:
                admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            answer = api.post("/v1/jobs", json=JOB)
            assert answer.status_code == 202 or refused_for_now(answer)
            if answer.status_code == 202:
                accepted.add(answer.json()["id"])

        eventually(lambda: api.post("/v1/jobs", json=JOB).status_code == 202)
        known = {str(row["id"]) for row in rows(impatient, "SELECT id FROM jobs")}
        assert accepted <= known


@pytest.mark.parametrize(
    "sqlstate",
    ["53100", "53200", "53300", "57P01", "57P03", "25006", "40001"],
    ids=["disk full", "memory", "connections", "shutdown", "starting", "standby", "conflict"],
)
def test_what_passes_in_postgres_is_no_fault_of_the_request_and_leaves_no_half_job(
    impatient: Settings, sqlstate: str
) -> None:
    with psycopg.connect(impatient.database.url, autocommit=True) as admin:
        admin.execute(
            f"CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION USING ERRCODE = '{sqlstate}'; END $$"
        )
        admin.execute(
            "CREATE TRIGGER refuse AFTER INSERT ON open_jobs FOR EACH ROW EXECUTE FUNCTION refuse()"
        )
        with running_api(impatient) as api:
            assert refused_for_now(api.post("/v1/jobs", json=JOB))
            assert refused_for_now(api.post("/v1/jobs/bulk", json={"jobs": [JOB] * 3}))
            assert rows(impatient, "SELECT id FROM jobs") == []
            admin.execute("DROP TRIGGER refuse ON open_jobs")

            assert api.post("/v1/jobs", json=JOB).status_code == 202


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
                b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
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
        "import sys, pathlib; from app.api.app import serve;"
        "from app.config.settings import Settings;"
        "serve(Settings.model_validate_json(pathlib.Path(sys.argv[1]).read_text()))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(file)], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            url = address_of(process)
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


def address_of(process: subprocess.Popen[str]) -> str:
    """The address that the process logs when it listens."""
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            return found[0]
    raise AssertionError("the process ended without an address")
