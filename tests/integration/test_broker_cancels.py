"""News of cancels over Redis."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import redis

from app.broker import cancels
from app.broker.publisher import Publisher
from app.broker.rights import Role, missing, rules
from app.config.settings import Settings
from app.errors import Unavailable
from tests.apis import running_api
from tests.own_redis import OwnRedis, running_redis
from tests.waiting import eventually
from tests.workers import rows, running_worker

JOB = uuid4()


@dataclass
class Hearer:
    """A worker's ear in a thread of its own; keeps what it hears."""

    publisher: Publisher
    worker_id: UUID = field(default_factory=uuid4)
    stop: threading.Event = field(default_factory=threading.Event)
    heard: queue.Queue[frozenset[UUID] | None] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        for job_ids in self.publisher.hear_cancels(self.worker_id, self.stop):
            self.heard.put(job_ids)

    def next(self) -> frozenset[UUID] | None:
        return self.heard.get(timeout=20)

    def until(self, wanted: frozenset[UUID]) -> list[frozenset[UUID] | None]:
        """What came before this."""
        before = []
        while (job_ids := self.next()) != wanted:
            before.append(job_ids)
        return before


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OwnRedis]:
    with running_redis(tmp_path) as server:
        yield server


@pytest.fixture(params=["", "mill:"])
def settings(
    request: pytest.FixtureRequest, make_settings: Callable[..., Settings], server: OwnRedis
) -> Settings:
    return make_settings(broker={"url": server.url, "key_prefix": request.param})


@pytest.fixture
def publisher(settings: Settings) -> Iterator[Publisher]:
    with closing(Publisher(settings)) as publisher:
        yield publisher


@pytest.fixture
def hearer(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hearer]:
    monkeypatch.setattr(cancels, "PING_S", 1.0)
    hearer = Hearer(publisher)
    try:
        assert hearer.next() is None  # now it hears, and looks for what it missed
        yield hearer
    finally:
        hearer.stop.set()
        hearer.thread.join(timeout=10)
    assert not hearer.thread.is_alive()


def test_a_cancel_wakes_the_worker_that_runs_the_job_and_no_other(
    publisher: Publisher, hearer: Hearer
) -> None:
    ids = [uuid4() for _ in range(1_000)]

    publisher.tell_cancelled(uuid4(), [JOB])
    publisher.tell_cancelled(hearer.worker_id, ids)

    assert hearer.next() == frozenset(ids)


def test_words_of_others_on_its_channel_are_no_jobs(
    server: OwnRedis, settings: Settings, publisher: Publisher, hearer: Hearer
) -> None:
    channel = settings.broker.key_prefix + cancels.channel_of(hearer.worker_id)
    with redis.Redis.from_url(server.url) as client:
        client.publish(channel, b"\xff\xfe no id")

    publisher.tell_cancelled(hearer.worker_id, [JOB])

    assert hearer.next() == frozenset()
    assert hearer.next() == frozenset({JOB})


def test_whose_connection_is_cut_connects_anew_and_looks_for_what_was_missed(
    server: OwnRedis, publisher: Publisher, hearer: Hearer
) -> None:
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    assert hearer.next() is None

    eventually(lambda: _told(publisher, hearer), 20)


def test_while_redis_is_away_the_rows_are_looked_at_again_and_again(
    server: OwnRedis, publisher: Publisher, hearer: Hearer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancels, "POLL_S", 0.01)
    server.stop()
    assert [hearer.next() for _ in range(3)] == [None] * 3
    with pytest.raises(Unavailable):
        publisher.tell_cancelled(hearer.worker_id, [JOB])

    server.start()

    eventually(lambda: _told(publisher, hearer), 20)


def test_a_server_that_falls_silent_is_away(
    server: OwnRedis, hearer: Hearer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancels, "PING_S", 0.1)
    assert hearer.heard.empty()

    server.process.send_signal(signal.SIGSTOP)
    try:
        assert hearer.next() is None
    finally:
        server.process.send_signal(signal.SIGCONT)


def test_the_rights_that_are_written_down_are_enough_to_tell_and_to_hear(
    server: OwnRedis,
    settings: Settings,
    make_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cancels, "PING_S", 1.0)

    def publisher_of(role: Role) -> Publisher:
        url = server.url.replace("://", f"://{role.value}:flour@")
        return Publisher(make_settings(broker={**settings.broker.model_dump(), "url": url}))

    with redis.Redis.from_url(server.url) as client:
        for role in Role:
            words = rules(settings, role)
            client.execute_command("ACL", "SETUSER", role.value, "reset", "on", ">flour", *words)
        hearer = Hearer(publisher_of(Role.WORKER))
        try:
            assert hearer.next() is None
            publisher_of(Role.SENDER).tell_cancelled(hearer.worker_id, [JOB])
            assert hearer.next() == frozenset({JOB})
        finally:
            hearer.stop.set()
            hearer.thread.join(timeout=10)
        client.execute_command("ACL", "SETUSER", Role.SENDER.value, "-publish")
        with closing(redis.Redis.from_url(server.url, username="sender", password="flour")) as own:
            channel = settings.broker.key_prefix + cancels.CHANNELS
            assert missing(settings, own, Role.SENDER) == [f"PUBLISH on {channel}"]


def _told(publisher: Publisher, hearer: Hearer) -> bool:
    """Whether it hears again; what it hears meanwhile is a reason to look."""
    try:
        publisher.tell_cancelled(hearer.worker_id, [JOB])
    except Unavailable:
        return False
    try:
        return hearer.heard.get(timeout=0.2) == frozenset({JOB})
    except queue.Empty:
        return False


# ── the whole way ───────────────────────────────────────────────────────────────────────────────


def test_a_cancel_over_http_reaches_the_running_job_and_a_worker_keeps_one_connection_to_postgres(
    make_settings: Callable[..., Settings], database_url: str, redis_url: str, tmp_path: Path
) -> None:
    # given a worker whose heartbeats will not bring it the news
    settings = make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        worker={"lease_s": 1_200, "heartbeat_s": 600},
    )
    with running_worker(settings, tmp_path / "worker"), running_api(settings) as api:

        def is_in(state: str, link: str) -> bool:
            return bool(api.get(link).json()["state"] == state)

        # when jobs that run are cancelled, by each of the three calls there are, then they end
        ways: tuple[Callable[[str], object], ...] = (
            lambda link: api.post(f"{link}/cancel"),
            lambda link: api.post("/v1/jobs/cancel", json={"ids": [link.rpartition("/")[2]]}),
            api.delete,
        )
        for cancel in ways:
            job = api.post("/v1/jobs", json={"body": {"prompt": "sleep 500000"}}).json()
            link = job["links"]["self"]
            eventually(partial(is_in, "running", link), 30)
            cancel(link)
            eventually(partial(is_in, "cancelled", link), 30)

        # and nobody keeps more connections than it is said to
        connections = rows(
            settings,
            "SELECT application_name AS name, count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() GROUP BY 1",
        )
        held = {each["name"]: each["count"] for each in connections}
        assert held["gristmill-worker"] == 1
        assert held["gristmill-listen"] == 1  # the API's

        # so 50 workers, 4 APIs and 2 rescues fit into what Postgres gives out by default
        an_api = settings.database.pool_size + held["gristmill-listen"]
        assert 50 * held["gristmill-worker"] + 4 * an_api + 2 <= 100 - 3
