"""Gristmill through a real PgBouncer, in session and in transaction mode."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import text

from app.broker.publisher import Publisher
from app.config.settings import Settings
from app.errors import ConfigError, Unavailable
from app.local.doctor import examine
from app.rescue import Rescue
from app.store import notices
from app.store.database import Database
from app.store.migration import migrate
from tests.apis import running_api
from tests.postgres_parts import PgBouncer, needs_pgbouncer
from tests.rows import insert, new_job
from tests.waiting import eventually
from tests.workers import running_worker

pytestmark = needs_pgbouncer

KINDS = [("session", ""), ("session", "options"), ("transaction", ""), ("transaction", "options")]


@pytest.fixture(params=KINDS, ids=[f"{mode}-{it or 'as-shipped'}" for mode, it in KINDS])
def pgbouncer(
    request: pytest.FixtureRequest, database_url: str, tmp_path: Path
) -> Iterator[PgBouncer]:
    mode, ignored = request.param
    with PgBouncer(tmp_path / "pgbouncer", database_url, mode, ignored) as pooler:
        yield pooler


@pytest.fixture
def pooled(pgbouncer: PgBouncer) -> Iterator[Database]:
    with closing(Database(pgbouncer.url, statement_timeout_ms=400)) as database:
        yield database


def test_statements_are_bounded_and_in_utc_in_every_transaction(pooled: Database) -> None:
    shown = text("SELECT current_setting('statement_timeout'), current_setting('timezone')")

    for _ in range(3):
        with pooled.begin() as connection:
            assert tuple(connection.execute(shown).one()) == ("400ms", "UTC")
        with pooled.autocommit() as connection:
            assert tuple(connection.execute(shown).one()) == ("400ms", "UTC")
            assert tuple(connection.execute(shown).one()) == ("400ms", "UTC")
    with pytest.raises(Unavailable, match="57014"), pooled.begin() as connection:
        connection.execute(text("SELECT pg_sleep(60)"))
    with pytest.raises(Unavailable, match="57014"), pooled.autocommit() as connection:
        connection.execute(text("SELECT pg_sleep(60)"))


def test_what_is_set_for_our_transactions_is_not_left_to_other_clients(
    pooled: Database, pgbouncer: PgBouncer
) -> None:
    with pooled.begin() as connection:
        connection.execute(text("SELECT 1"))
    with pooled.autocommit() as connection:
        connection.execute(text("SELECT 1"))

    with psycopg.connect(pgbouncer.url) as other:
        assert other.execute("SHOW statement_timeout").fetchone() == ("0",)


def test_settings_of_the_url_reach_every_transaction(pgbouncer: PgBouncer) -> None:
    url = pgbouncer.url + "?options=-c%20search_path%3Delsewhere%2Cpublic"

    with closing(Database(url)) as database, database.begin() as connection:
        assert connection.scalar(text("SHOW search_path")) == "elsewhere,public"


def test_each_statement_of_autocommit_is_kept_also_after_one_that_failed(pooled: Database) -> None:
    with pooled.autocommit() as connection:
        connection.execute(text("CREATE TABLE kept (id int)"))
        with pytest.raises(Exception, match="division"):
            connection.execute(text("SELECT 1 / 0"))
        connection.execute(text("INSERT INTO kept VALUES (1)"))
    with pooled.begin() as connection:
        assert connection.scalar(text("SELECT count(*) FROM kept")) == 1


def test_many_clients_that_repeat_their_statements_never_run_another_ones(
    pgbouncer: PgBouncer,
) -> None:
    """More connections than server processes, each statement often enough to be prepared."""

    def repeat(number: int) -> None:
        with closing(Database(pgbouncer.url, pool_size=2)) as database:
            for _ in range(40):
                with database.begin() as connection:
                    found = connection.scalar(text(f"SELECT {number} + :it"), {"it": 0})
                    assert found == number
                with database.autocommit() as connection:
                    assert connection.scalar(text(f"SELECT {number}")) == number

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(repeat, range(4)))


def test_statement_mode_is_refused_by_name(database_url: str, tmp_path: Path) -> None:
    with (
        PgBouncer(tmp_path / "pgbouncer", database_url, "statement") as pooler,
        closing(Database(pooler.url)) as database,
    ):
        for reach in (database.check_schema, lambda: migrate(pooler.url)):
            with pytest.raises(ConfigError, match=r"database\.url .* statement mode"):
                reach()


def test_a_pooler_is_found_and_a_server_alone_is_not_taken_for_one(
    pooled: Database, database: Database
) -> None:
    assert pooled.found().is_pooled
    assert not database.found().is_pooled


def test_the_doctor_says_what_is_between_and_how_many_connections_are_left(
    pgbouncer: PgBouncer,
    database_url: str,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GRISTMILL_BROKER__URL", redis_url)
    monkeypatch.setenv("GRISTMILL_DATABASE__URL", pgbouncer.url)
    monkeypatch.setenv("GRISTMILL_DATABASE__LISTEN_URL", database_url)

    findings = {finding.name: finding for finding in islice(examine(), 6)}

    assert findings["Postgres"].ok
    assert "behind a pooler" in findings["Postgres"].detail
    said = re.search(r"; (\d+) of (\d+) connections are in use$", findings["Postgres"].detail)
    assert said and 1 <= int(said[1]) < int(said[2])
    assert findings["news"].ok


def test_the_schema_is_migrated_through_it(empty_database_url: str, tmp_path: Path) -> None:
    with PgBouncer(tmp_path / "pgbouncer", empty_database_url, "transaction") as pooler:
        migrate(pooler.url)
        with closing(Database(pooler.url)) as database:
            database.check_schema()


def test_news_come_by_looking_again_and_again(
    pgbouncer: PgBouncer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notices, "POLL_S", 0.01)
    stop = threading.Event()
    heard = notices.listen(pgbouncer.url, stop)

    looks = [next(heard) for _ in range(3)]
    stop.set()

    assert looks == [None] * 3
    assert list(heard) in ([], [None])


@pytest.mark.parametrize("listen_directly", [False, True], ids=["polling", "listen_url"])
def test_api_worker_and_rescue_do_their_work_through_it(
    pgbouncer: PgBouncer,
    database_url: str,
    redis_url: str,
    make_settings: Callable[..., Settings],
    tmp_path: Path,
    listen_directly: bool,
) -> None:
    # given an API and a worker that know Postgres through the pooler alone, and a lost message
    given = {"url": pgbouncer.url, "pool_size": 4}
    if listen_directly:
        given["listen_url"] = database_url
    settings = make_settings(
        database=given, broker={"url": redis_url}, rescue={"lost_after_s": 0.2, "sweep_ms": 50}
    )
    with closing(Database(database_url)) as direct:
        [lost] = insert(direct, new_job(model="stub"))
    with running_worker(settings, tmp_path / "worker") as worker, running_api(settings) as api:
        assert api.get("/readyz").json()["status"] == "ready"

        # when jobs come in, one by one and many at once, and one is cancelled
        bulk = api.post("/v1/jobs/bulk", json={"jobs": [{"body": {"prompt": "x"}}] * 30}).json()
        one = api.post("/v1/jobs?wait=30", json={"body": {"prompt": "A grist mill is"}})
        late = {"body": {"prompt": "x"}, "not_before": "2999-01-01T00:00:00Z"}
        cancelled = api.post("/v1/jobs", json=late).json()["id"]
        assert api.post(f"/v1/jobs/{cancelled}/cancel").status_code == 200

        # then all end as they should, the lost one by rescue
        assert (one.status_code, one.json()["state"]) == (200, "completed")
        ids = [item["id"] for item in bulk["items"]]
        with closing(Database(pgbouncer.url)) as database, closing(Publisher(settings)) as sender:
            rescue = Rescue(settings, database, sender)

            def are_done(asked: list[str | UUID]) -> bool:
                rescue.sweep()
                states = [api.get(f"/v1/jobs/{id}").json()["state"] for id in asked]
                return set(states) == {"completed"}

            eventually(lambda: are_done([*ids, lost]), timeout_s=30)
        assert not worker.has_ended
        assert "Traceback" not in worker.log


def test_a_cancel_reaches_a_running_job_long_before_the_next_heartbeat(
    database_url: str, redis_url: str, make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    with PgBouncer(tmp_path / "pgbouncer", database_url, "transaction") as pooler:
        settings = make_settings(
            database={"url": pooler.url},
            broker={"url": redis_url},
            worker={"lease_s": 1_200, "heartbeat_s": 600},
        )
        with running_worker(settings, tmp_path / "worker"), running_api(settings) as api:
            job = api.post("/v1/jobs", json={"body": {"prompt": "sleep 500000"}}).json()["links"]
            eventually(lambda: api.get(job["self"]).json()["state"] == "running", timeout_s=30)

            api.post(job["cancel"])

            eventually(lambda: api.get(job["self"]).json()["state"] == "cancelled", timeout_s=30)
