"""News of jobs over Postgres notifications."""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from app.jobs import Kind
from app.store import cancellation, claims, submissions, sweeps
from app.store.database import Database, link_of
from app.store.notices import MAX_IDS, ended, listen
from app.store.submissions import RejectedJob
from tests.rows import Worker, completed, insert, new_job, rewrite
from tests.waiting import eventually


@dataclass
class Listener:
    """Listens in a thread and keeps what it hears."""

    url: str
    stop: threading.Event = field(default_factory=threading.Event)
    heard: queue.Queue[frozenset[UUID] | None] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        for job_ids in listen(self.url, self.stop):
            self.heard.put(job_ids)

    def next(self) -> frozenset[UUID] | None:
        return self.heard.get(timeout=10)


@pytest.fixture
def listener(database_url: str) -> Iterator[Listener]:
    listener = Listener(database_url)
    try:
        assert listener.next() is None
        yield listener
    finally:
        listener.stop.set()
        listener.thread.join(timeout=10)
    assert not listener.thread.is_alive()


def test_every_way_to_end_a_job_is_news(database: Database, listener: Listener) -> None:
    worker = Worker.registered(database)
    finished, cancelled, expired, given_up = insert(
        database, *(new_job(max_attempts=1) for _ in range(4))
    )
    rejected = RejectedJob(id=uuid4(), kind=Kind.GENERATE, error_code="x", error_message="X.")

    worker.complete(worker.claim([finished]))
    assert listener.next() == {finished}

    with database.begin() as connection:
        cancellation.cancel(connection, cancelled)
    assert listener.next() == {cancelled}

    rewrite(database, "deadline = now()", expired)
    with database.begin() as connection:
        sweeps.expire_deadlines(connection, sweeps.find_late(connection, 10))
    assert listener.next() == {expired}

    [claimed] = worker.claim([given_up])
    worker.release(claimed, charged=True)
    assert listener.next() == {given_up}

    with database.begin() as connection:
        submissions.reject(connection, [rejected])
    assert listener.next() == {rejected.id}


def test_a_cancel_names_the_workers_that_run_its_jobs(database: Database) -> None:
    queued, *running = insert(database, *(new_job() for _ in range(4)))
    one, other = Worker.registered(database), Worker.registered(database)
    one.claim(running[:2])
    other.claim(running[2:])

    with database.begin() as connection:
        cancellation.cancel_free(connection, [queued, *running[1:]])

    with database.begin() as connection:
        told = cancellation.who_runs(connection, [queued, *running])
    assert told == {one.id: [running[1]], other.id: [running[2]]}


def test_jobs_that_end_in_one_commit_are_told_in_as_few_notifications_as_hold_their_ids(
    database: Database, listener: Listener
) -> None:
    ids = insert(database, *(new_job() for _ in range(2 * MAX_IDS + 1)))

    with database.begin() as connection:
        cancellation.cancel_free(connection, ids)

    heard = [listener.next() or frozenset() for _ in range(3)]
    assert sorted(map(len, heard)) == [1, MAX_IDS, MAX_IDS]
    assert frozenset().union(*heard) == frozenset(ids)


def test_the_commit_of_a_finish_sends_no_notification_so_that_it_waits_for_no_other(
    database: Database, listener: Listener
) -> None:
    """Postgres lets one transaction with notifications commit at a time."""
    worker = Worker.registered(database)
    first, second = insert(database, new_job(), new_job())
    with database.autocommit() as connection:
        claims.finish(connection, [completed(worker.claim([first])[0])])
    worker.complete(worker.claim([second]))

    heard = listener.next()

    assert heard == {second}


def test_a_finish_and_its_news_are_two_transactions_in_one_round_trip(
    database_url: str, database: Database, listener: Listener, tmp_path: Path
) -> None:
    """All of it has been sent while the finish still waits for a lock, and nothing is told yet."""
    wire = tmp_path / "wire"
    with closing(Database(database_url, pool_size=1)) as one, wire.open("w") as written:
        worker = Worker.registered(one)
        claimed = worker.claim(insert(one, *(new_job() for _ in range(3))))
        with one.autocommit() as connection:
            link = link_of(connection)
        with ThreadPoolExecutor() as pool:
            with database.begin() as connection:
                connection.execute(text("SELECT FROM open_jobs FOR UPDATE"))
                link.pgconn.trace(written.fileno())
                finishing = pool.submit(worker.complete, claimed)
                eventually(
                    lambda: re.findall(r"\tF\t.*\t(Sync)\b", wire.read_text()) == ["Sync"] * 2
                )
                assert "\tB\t" not in wire.read_text()
            assert len(finishing.result()) == 3
        link.pgconn.untrace()

    assert listener.next() == {each.job_id for each in claimed}


def test_news_that_does_not_wait_for_the_disk_leaves_the_commits_after_it_as_they_were(
    database_url: str,
) -> None:
    with closing(Database(database_url, pool_size=1)) as database:
        with database.autocommit() as connection:
            connection.execute(text("SET synchronous_commit = on"))

        with database.autocommit(then=ended([uuid4()])) as connection:
            for _ in range(2):
                assert connection.scalar(text("SHOW synchronous_commit")) == "on"


def test_news_of_a_transaction_that_fails_is_none(database: Database, listener: Listener) -> None:
    dropped, kept = insert(database, new_job(), new_job())

    def cancel_and_fail() -> None:
        with database.begin() as connection:
            cancellation.cancel(connection, dropped)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cancel_and_fail()
    with database.begin() as connection:
        cancellation.cancel(connection, kept)

    assert listener.next() == {kept}


def test_after_a_lost_connection_the_listener_comes_back_and_says_look_again(
    database: Database, listener: Listener
) -> None:
    [job_id] = insert(database, new_job())
    with database.begin() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'gristmill-listen' AND datname = current_database()"
            )
        )

    assert listener.next() is None
    with database.begin() as connection:
        cancellation.cancel(connection, job_id)
    assert listener.next() == {job_id}


def test_a_listener_without_a_server_stops_when_it_is_told() -> None:
    stop = threading.Event()
    url = "postgresql://127.0.0.1:1/nowhere"
    thread = threading.Thread(target=partial(list, listen(url, stop)))
    thread.start()

    stop.set()
    thread.join(timeout=10)

    assert not thread.is_alive()
