"""Postgres that only reads: a hot standby, a primary that became one, and what follows."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import text

from app.config.settings import Settings
from app.errors import Unavailable
from app.local.servers import EmbeddedPostgres
from app.store import notices
from app.store.database import Database
from app.store.migration import migrate
from tests.apis import running_api
from tests.postgres_parts import Standby
from tests.rows import insert, new_job
from tests.waiting import eventually
from tests.workers import running_worker


@pytest.fixture
def primary(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(tmp_path / "primary", durable=False) as server:
        migrate(server.url)
        yield server


@pytest.fixture
def standby(primary: EmbeddedPostgres, tmp_path: Path) -> Iterator[Standby]:
    with Standby(tmp_path / "standby", primary) as server:
        yield server


def read_only(url: str, is_on: bool) -> None:
    """What a provider does at a failover, or before a disk is full: no connection is cut."""
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(f"ALTER SYSTEM SET default_transaction_read_only = {is_on}")
        admin.execute("SELECT pg_reload_conf()")


def writes(database: Database) -> bool:
    try:
        insert(database, new_job())
    except Unavailable:
        return False
    return True


def test_a_standby_is_not_a_database_to_work_with(standby: Standby) -> None:
    with (
        closing(Database(standby.url)) as database,
        pytest.raises(Unavailable, match="read-only"),
        database.begin(),
    ):
        pass


@pytest.mark.parametrize("ping_after_s", [0.0, 3600.0], ids=["tried before", "not tried before"])
def test_connections_to_what_only_reads_now_are_dropped(
    primary: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch, ping_after_s: float
) -> None:
    # given a pool with open connections to a server that takes no writes any more
    monkeypatch.setattr("app.store.database.PING_AFTER_S", ping_after_s)
    with closing(Database(primary.url, pool_size=3)) as database:
        with database.begin() as one, database.begin() as other:
            before = {each.scalar(text("SELECT pg_backend_pid()")) for each in (one, other)}
        read_only(primary.url, True)

        # when it is written to, then it is away, and no connection to it is kept
        eventually(lambda: not writes(database))
        read_only_again = pytest.raises(Unavailable, match="read-only")
        with read_only_again, database.begin() as connection:
            connection.execute(text("SELECT 1"))

        # and when it takes writes again, then they are taken over new connections
        with psycopg.connect(primary.url, autocommit=True) as admin:
            admin.execute("SET default_transaction_read_only = off")
            admin.execute("ALTER SYSTEM SET default_transaction_read_only = off")
            admin.execute("SELECT pg_reload_conf()")
        eventually(lambda: writes(database))
        with database.begin() as connection:
            assert connection.scalar(text("SELECT pg_backend_pid()")) not in before


def url_of_both(primary: EmbeddedPostgres, standby: Standby, *, standby_first: bool = False) -> str:
    servers = [primary.url.rpartition("@")[2].partition("/")[0], standby.address]
    if standby_first:
        servers.reverse()
    return primary.url.replace(primary.url.rpartition("@")[2], ",".join(servers) + "/gristmill")


@pytest.mark.parametrize("first", ["standby", "primary"])
def test_a_url_of_several_hosts_finds_the_one_that_takes_writes(
    primary: EmbeddedPostgres, standby: Standby, first: str
) -> None:
    url = url_of_both(primary, standby, standby_first=first == "standby")

    with closing(Database(url, pool_size=2)) as database:
        assert writes(database)

        # when the primary dies and the standby is promoted, then it is found
        primary.stop()
        standby.promote()
        eventually(lambda: writes(database), timeout_s=30)


def test_a_listener_that_meets_a_standby_goes_on_once_it_is_promoted(
    primary: EmbeddedPostgres, standby: Standby
) -> None:
    # given listeners, also one that takes whatever server it gets, and a standby in place of theirs
    stop = threading.Event()
    heard: dict[str, queue.Queue[frozenset[UUID] | None]] = {}
    threads = []
    for url in (standby.url, standby.url + "?target_session_attrs=any"):
        news = heard[url] = queue.Queue()

        def listen(url: str = url, news: queue.Queue[frozenset[UUID] | None] = news) -> None:
            for job_ids in notices.listen(url, stop):
                news.put(job_ids)

        threads.append(threading.Thread(target=listen))
    for thread in threads:
        thread.start()
    try:
        with pytest.raises(queue.Empty):
            heard[standby.url].get(timeout=1)
        assert all(thread.is_alive() for thread in threads)

        # when it is promoted, then all of them hear
        primary.stop()
        standby.promote()
        for news in heard.values():
            assert news.get(timeout=20) is None
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)


def test_api_and_worker_go_on_after_a_failover_and_polls_are_answered_at_once(
    primary: EmbeddedPostgres,
    standby: Standby,
    redis_url: str,
    make_settings: Callable[..., Settings],
    tmp_path: Path,
) -> None:
    settings = make_settings(
        database={"url": url_of_both(primary, standby)},
        broker={"url": redis_url},
        worker={"lease_s": 3, "heartbeat_s": 0.5},
    )
    job = {"body": {"prompt": "A grist mill is"}}
    with running_worker(settings, tmp_path / "worker") as worker, running_api(settings) as api:
        # given a system that has met the standby: its listeners were cut off, and it is not ready
        assert api.post("/v1/jobs?wait=30", json=job).json()["state"] == "completed"
        primary.stop()
        eventually(lambda: api.get("/readyz").status_code == 503)
        assert api.post("/v1/jobs", json=job).status_code == 503

        # when the standby is promoted
        standby.promote()
        eventually(lambda: api.get("/readyz").status_code == 200, timeout_s=30)
        eventually(lambda: api.post("/v1/jobs?wait=20", json=job).status_code == 200, timeout_s=60)

        # then all goes on, news included, in the same processes
        answer = api.post("/v1/jobs?wait=60", json=job)
        assert answer.json()["state"] == "completed"
        assert answer.elapsed < timedelta(seconds=15)
        assert not worker.has_ended
