"""What the API says is so: an answer after the commit, a no, readiness, the time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import redis

from app.api import services
from app.config.settings import Settings
from app.errors import SchemaError, Unavailable
from app.intake import submit
from app.intake.decision import Decision
from app.intake.sender import Sender
from app.intake.submit import Submitter
from app.local.servers import EmbeddedPostgres, EmbeddedRedis
from app.store import reads, submissions
from app.store.migration import migrate
from app.store.submissions import NewJob
from tests.apis import running_api
from tests.integration.test_api_outages import address_of
from tests.integration.test_postgres_failover import read_only
from tests.waiting import eventually
from tests.workers import rows

JOB = {"body": {"prompt": "A grist mill is"}}


# ── after the commit, and before it ─────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs/bulk"])
def test_an_answer_does_not_wait_for_what_follows_its_commit(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    is_answered = threading.Event()
    monkeypatch.setattr(Sender, "send", lambda *_: is_answered.wait(60))
    with running_api(settings) as api:
        answer = api.post(path, json={"jobs": [JOB] * 3} if path.endswith("bulk") else JOB)
        is_answered.set()

    assert answer.status_code == 202
    assert answer.elapsed < timedelta(seconds=20)


def _raises(error: type[Exception]) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    "find",
    [_raises(Unavailable), _raises(SchemaError), _raises(ZeroDivisionError), lambda *_, **__: []],
    ids=["away", "another schema", "a bug", "lost by a failover"],
)
def test_nothing_that_follows_the_commit_turns_the_answer_into_an_error(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, find: Callable[..., Any]
) -> None:
    monkeypatch.setattr(Sender, "send", lambda *_: 1 / 0)
    with running_api(settings) as api:
        monkeypatch.setattr(reads, "find", find)
        answer = api.post("/v1/jobs", json=JOB | {"priority": 3})
        bulk = api.post("/v1/jobs/bulk", json={"jobs": [JOB] * 3})
        monkeypatch.undo()
        seen = api.get(answer.headers["location"])

    assert (answer.status_code, bulk.status_code, bulk.json()["accepted"]) == (202, 202, 3)
    passing = ("_at", "before", "position", "eta")
    told = {name: it for name, it in answer.json().items() if not name.endswith(passing)}
    assert told.items() <= seen.json().items()


def test_whoever_was_told_no_stays_without_a_job(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a submission whose row is written when its time is over, and not committed yet
    is_answered, is_over = threading.Event(), threading.Event()
    insert = submissions.insert_jobs

    def slow(*given: Any) -> Sequence[submissions.Inserted]:
        inserted = insert(*given)
        is_answered.wait(60)
        is_over.set()
        return inserted

    monkeypatch.setattr(submissions, "insert_jobs", slow)
    given = settings.database
    timeouts_s = given.connect_timeout_s + given.statement_timeout_ms / 1000
    monkeypatch.setattr(services, "SPARE_S", 0.5 - timeouts_s)  # half a second for everything
    with running_api(settings) as api:
        # when its caller was told to come back
        answer = api.post("/v1/jobs", json=JOB)
        is_answered.set()
        assert is_over.wait(10)
        monkeypatch.setattr(submissions, "insert_jobs", insert)

        # then nothing of it is kept
        assert answer.status_code == 503
        open_transactions = (
            "SELECT 1 FROM pg_stat_activity WHERE xact_start IS NOT NULL "
            "AND pid <> pg_backend_pid() AND datname = current_database()"
        )
        eventually(lambda: not rows(settings, open_transactions))
        assert rows(settings, "SELECT id FROM jobs") == []


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs/bulk"])
def test_the_time_of_a_write_begins_when_all_is_checked(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    # given submissions whose checks may take any time
    happened: list[str] = []
    check = Submitter.check

    def note_check(submitter: Submitter, value: object, **given: Any) -> NewJob:
        happened.append("checked")
        return check(submitter, value, **given)

    class NotedDecision(Decision):
        def __init__(self) -> None:
            super().__init__()
            happened.append("asked the store")

    monkeypatch.setattr(Submitter, "check", note_check)
    monkeypatch.setattr(services, "Decision", NotedDecision)

    # when some are submitted, in several pieces
    monkeypatch.setattr("app.api.jobs.calls.PIECE_BYTES", 100)
    with running_api(settings) as api:
        answer = api.post(path, json={"jobs": [JOB] * 5} if path.endswith("bulk") else JOB)

    # then nothing of that counts towards the time of the store
    assert answer.status_code == 202
    assert happened == ["checked"] * (5 if path.endswith("bulk") else 1) + ["asked the store"]


def test_a_bulk_of_several_pages_is_one_transaction_and_one_key_is_one_job(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "PAGE_BYTES", 100)
    jobs = [
        {"body": {"prompt": f"wheel {n}"}, "idempotency_key": key}
        for n, key in enumerate(["b", "a", None, "é", "B", None, "c"])
    ]
    with running_api(settings) as api:
        # when a bulk of several pages holds some jobs twice
        bulk = api.post("/v1/jobs/bulk", json={"jobs": [*jobs, *jobs]}).json()

        # then each has its answer in its place, and its row
        ids = [item["id"] for item in bulk["items"]]
        prompts = {
            str(row["id"]): row["request"]["prompt"]
            for row in rows(settings, "SELECT id, request FROM jobs")
        }
        assert [prompts[id_] for id_ in ids] == [f"wheel {n}" for n in range(7)] * 2
        assert len(prompts) == 9  # those without a key are two jobs each

        # and if a later page fails nothing of it is stored
        insert = submissions.insert_jobs
        num_pages = 0

        def fail(*given: Any) -> Sequence[submissions.Inserted]:
            nonlocal num_pages
            num_pages += 1
            if num_pages == 3:
                raise Unavailable
            return insert(*given)

        monkeypatch.setattr(submissions, "insert_jobs", fail)
        more = [{"body": {"prompt": f"rye {n} " + "x" * 60}} for n in range(5)]
        assert api.post("/v1/jobs/bulk", json={"jobs": more}).status_code == 503
        assert len(rows(settings, "SELECT id FROM jobs")) == 9


def test_a_job_that_the_store_refuses_is_refused_alone(settings: Settings) -> None:
    with psycopg.connect(settings.database.url, autocommit=True) as admin:
        admin.execute(
            "ALTER TABLE requests ADD CONSTRAINT no_chaff CHECK (request ->> 'prompt' <> 'chaff')"
        )
    prompts = ["wheat", "chaff", "rye", "oats", "chaff", "barley", "spelt"]
    with running_api(settings) as api:
        single = api.post("/v1/jobs", json={"body": {"prompt": "chaff"}})
        jobs = [{"body": {"prompt": prompt}} for prompt in prompts]
        bulk = api.post("/v1/jobs/bulk", json={"jobs": jobs}).json()

    assert (single.status_code, single.json()["code"]) == (400, "invalid_request")
    assert [item["status"] for item in bulk["items"]] == [
        400 if prompt == "chaff" else 202 for prompt in prompts
    ]
    assert len(rows(settings, "SELECT id FROM jobs")) == 5


# ── readiness ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(tmp_path / "postgres", durable=False) as server:
        migrate(server.url)
        yield server


def status(api: httpx.Client) -> tuple[int, str]:
    ready = api.get("/readyz")
    return ready.status_code, ready.json()["status"]


def test_readiness_is_that_of_submissions_while_postgres_only_reads(
    make_settings: Callable[..., Settings], redis_url: str, postgres: EmbeddedPostgres
) -> None:
    settings = make_settings(database={"url": postgres.url}, broker={"url": redis_url})
    with running_api(settings) as api:
        assert status(api) == (200, "ready")

        read_only(postgres.url, True)
        eventually(lambda: api.post("/v1/jobs", json=JOB).status_code == 503)
        eventually(lambda: status(api) == (503, "unavailable"))
        assert not api.get("/readyz").json()["checks"]["postgres"]["ok"]

        read_only(postgres.url, False)
        eventually(lambda: status(api) == (200, "ready"), timeout_s=20)
        assert api.post("/v1/jobs", json=JOB).status_code == 202


def refuse_inserts(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION USING ERRCODE = 'XX000'; END $$"
        )
        admin.execute("CREATE TRIGGER refuse BEFORE INSERT ON open_jobs EXECUTE FUNCTION refuse()")


def test_an_api_whose_submissions_fail_for_whatever_reason_is_not_ready(
    settings: Settings,
) -> None:
    refuse_inserts(settings.database.url)
    with running_api(settings) as api:
        assert api.post("/v1/jobs", json=JOB).status_code == 500
        assert status(api) == (503, "unavailable")


@pytest.mark.parametrize("fault", ["stopped", "frozen", "read-only", "full"])
def test_readiness_says_that_redis_takes_no_messages(
    make_settings: Callable[..., Settings], database_url: str, tmp_path: Path, fault: str
) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        settings = make_settings(
            database={"url": database_url}, broker={"url": server.url, "publish_timeout_s": 0.5}
        )
        with running_api(settings) as api, redis.Redis.from_url(server.url) as client:
            assert status(api) == (200, "ready")
            assert server.pid is not None
            match fault:
                case "stopped":
                    server.stop()
                case "frozen":
                    os.kill(server.pid, signal.SIGSTOP)
                case "read-only":
                    client.replicaof("127.0.0.1", 1)
                case "full":
                    client.config_set("maxmemory", 1)
            try:
                eventually(lambda: status(api) == (200, "degraded"))
                redis_up = [
                    line
                    for line in api.get("/metrics").text.splitlines()
                    if line.startswith("gristmill_redis_up")
                ]
                assert redis_up == ["gristmill_redis_up 0.0"]
            finally:
                if fault == "frozen":
                    os.kill(server.pid, signal.SIGCONT)


def test_however_many_probes_there_are_it_is_tried_once_in_a_while_and_leaves_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0
    attempt = Submitter.try_to_store

    def count(submitter: Submitter) -> None:
        nonlocal tries
        tries += 1
        attempt(submitter)

    monkeypatch.setattr(Submitter, "try_to_store", count)
    monkeypatch.setattr("app.api.probe.FRESH_S", 60.0)
    with running_api(settings) as api:
        assert {status(api) for _ in range(20)} == {(200, "ready")}
    assert tries == 1
    assert rows(settings, "SELECT id FROM jobs") == []


def test_probes_are_answered_while_all_threads_wait_for_a_lock(settings: Settings) -> None:
    with (
        running_api(settings) as api,
        psycopg.connect(settings.database.url) as locking,
    ):
        locking.execute("LOCK TABLE open_jobs IN ACCESS EXCLUSIVE MODE")
        began = time.monotonic()
        ready = api.get("/readyz")

        assert ready.status_code == 503
        assert time.monotonic() - began < 10
        locking.rollback()
        eventually(lambda: status(api) == (200, "ready"), timeout_s=20)


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_may_ask_with_head_and_no_answer_is_kept(settings: Settings, path: str) -> None:
    with running_api(settings) as api:
        head, get = api.head(path), api.get(path)

    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["cache-control"] == get.headers["cache-control"] == "no-store"


# ── time ────────────────────────────────────────────────────────────────────────────────────────

SERVE = """
import sys, pathlib
from app.api.app import serve
from app.config.settings import Settings
serve(Settings.model_validate_json(pathlib.Path(sys.argv[1]).read_text()))
"""


@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is not installed")
@pytest.mark.parametrize("offset", ["+1h", "-1h"])
def test_deadlines_are_judged_by_the_database_s_clock(
    settings: Settings, tmp_path: Path, offset: str
) -> None:
    file = tmp_path / "settings.json"
    file.write_text(settings.model_dump_json())
    command = ["faketime", "-f", offset, sys.executable, "-c", SERVE, str(file)]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"FAKETIME_DONT_FAKE_MONOTONIC": "1"},
        start_new_session=True,  # faketime starts another process, and stays
    ) as process:
        try:
            url = address_of(process)

            def deadline_in(minutes: int) -> int:
                when = datetime.now(UTC) + timedelta(minutes=minutes)
                job = JOB | {"deadline": when.isoformat()}
                return httpx.post(f"{url}/v1/jobs", json=job, timeout=60).status_code

            assert (deadline_in(30), deadline_in(-30)) == (202, 422)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
