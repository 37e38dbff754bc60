"""Many messages at once, and the notes that keep each of them: Redis alone."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import pytest
import redis
from kombu.entity import Queue
from kombu.messaging import Consumer

from app.broker.app import make_app
from app.broker.lanes import Used, Whose
from app.broker.queues import PATIENT_SHARE, Layout, queue_name
from app.broker.tally import Tally
from app.config.settings import ModelSettings, Settings
from tests.own_redis import OwnRedis, running_redis
from tests.pushed import push

STUB = {"source": "stub", "kind": "generate", "engine": "stub", "max_batch_size": 100}
QUEUE = queue_name("stub")
MILL: Whose = ("stub", 0, "mill")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnRedis]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def client(server: OwnRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("ACL", "SETUSER", "miller", "reset", "on", ">flour", "~*", "&*")
        client.acl_setuser("miller", enabled=True, categories=["+@all"])
        client.flushdb()
        yield client


@pytest.fixture
def settings(make_settings: Callable[..., Settings], server: OwnRedis) -> Settings:
    url = server.url.replace("://", "://miller:flour@")
    models = {"stub": ModelSettings.model_validate(STUB)}
    return make_settings(broker={"url": url, "key_prefix": "mill:"}, models=models)


class Taker:
    """A channel that takes messages as a worker does and holds them until they are acknowledged."""

    def __init__(self, connection: Any, most: int) -> None:
        self.connection = connection
        self.channel = connection.channel()
        self.held: list[Any] = []
        queue: Any = Queue
        queues = [queue(name, exchange="", routing_key=name) for name in (QUEUE, "celery")]
        make: Any = Consumer
        consumer = make(self.channel, queues, on_message=self.held.append, accept=["json"])
        consumer.qos(prefetch_count=most)
        consumer.consume()

    @property
    def ids(self) -> list[str]:
        return [message.headers["id"] for message in self.held]

    def take_all(self) -> list[str]:
        """Take until nothing comes any more; the ids of what is held."""
        try:
            while True:
                self.connection.drain_events(timeout=0.2)
        except TimeoutError:
            return self.ids


@contextmanager
def taking(settings: Settings, most: int = 1_000) -> Iterator[Taker]:
    with make_app(settings) as app, app.connection_for_read() as connection:
        yield Taker(connection, most)


def send(client: redis.Redis, number: int, priority: int = 0) -> list[str]:
    return push(client, f"mill:{QUEUE}", "stub", number, priority)


def calls(client: redis.Redis) -> dict[str, int]:
    found = client.info("commandstats")
    return {name.removeprefix("cmdstat_"): each["calls"] for name, each in found.items()}


def unacked(client: redis.Redis) -> int:
    assert client.hlen("mill:unacked") == client.zcard("mill:unacked_index")
    return client.hlen("mill:unacked")


def test_a_hundred_messages_are_fetched_in_a_few_round_trips_and_taken_off_in_one(
    client: redis.Redis, settings: Settings
) -> None:
    sent = send(client, 100)
    with taking(settings) as taker:
        taker.channel.connection.loop = "a hub that stands still"
        client.config_resetstat()

        assert taker.take_all() == sent

        assert unacked(client) == 100
        assert calls(client)["brpop"] + calls(client)["evalsha"] < 10  # kombu's locks among them
        for message in taker.held:
            message.ack()
        assert unacked(client) == 100
        taker.channel.settle()
        assert unacked(client) == 0
        assert calls(client)["hdel"] == 1


def test_room_that_done_work_makes_is_filled_in_the_round_trip_that_takes_it_off(
    client: redis.Redis, settings: Settings
) -> None:
    sent = send(client, 500)
    with taking(settings, most=50) as taker:
        taker.channel.connection.loop = "a hub that stands still"
        assert taker.take_all() == sent[:50]
        client.config_resetstat()

        for message in taker.held[:40]:
            message.ack()
        taker.channel.settle()

        assert taker.ids == sent[:90]
        assert unacked(client) == 50
        assert calls(client)["evalsha"] == 1
        assert "brpop" not in calls(client)


def told_ns(client: redis.Redis) -> float:
    """What a job is taken to cost by now; it is near what was told of 64 jobs or more."""
    layout = Layout(prefix="mill:")
    return float(client.hget(f"{layout.lane(QUEUE, 0)}{layout.sep}fair", "all") or 0)


@pytest.fixture
def tally(settings: Settings) -> Tally:
    return Tally(Layout.of(settings))


def test_what_jobs_used_is_told_in_the_round_trip_that_takes_them_off_and_before_the_next_come(
    client: redis.Redis, settings: Settings, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = send(client, 100)
    trips: list[list[str]] = []
    execute = redis.client.Pipeline.execute

    def counted(pipe: Any, *given: Any, **named: Any) -> Any:
        trips.append([words[0] for words, _ in pipe.command_stack])
        return execute(pipe, *given, **named)

    with taking(settings, most=50) as taker:
        taker.channel.connection.loop = "a hub that stands still"
        taker.channel.tally = tally
        taker.take_all()
        monkeypatch.setattr(redis.client.Pipeline, "execute", counted)

        for message in taker.held[:40]:
            tally.note(MILL, Used(2, 2, 10_000_000))
            message.ack()
        taker.channel.settle()

        assert taker.ids == sent[:90]
        assert trips == [["EVAL", "ZREM", "HDEL", "EVALSHA"]]
        assert told_ns(client) == 5_000_000


def test_what_jobs_used_is_told_alone_where_nothing_else_is_said_for_a_while(
    client: redis.Redis, settings: Settings, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    with taking(settings) as taker:
        taker.channel.tally = tally
        client.config_resetstat()
        for _ in range(3):
            tally.note(MILL, Used(64, 64, 64_000_000))
            taker.channel.settle()
        assert calls(client)["eval"] == 1

        monkeypatch.setattr("app.broker.tally.PAUSE_S", 0)
        taker.channel.settle()
        taker.channel.settle()

        assert calls(client)["eval"] == 2


def test_what_jobs_used_is_told_over_the_next_connection_if_one_is_lost(
    client: redis.Redis, settings: Settings, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    def cut_off(*_: Any, **__: Any) -> Any:
        raise ConnectionResetError("Connection reset by peer")

    monkeypatch.setattr("app.broker.tally.PAUSE_S", 0)
    tally.note(MILL, Used(64, 64, 64 * 5_000_000))
    with taking(settings) as taker, monkeypatch.context() as lost:
        taker.channel.tally = tally
        lost.setattr(redis.client.Pipeline, "execute", cut_off)
        with pytest.raises(ConnectionResetError):
            taker.channel.settle()
    sent = send(client, 1)
    # when
    with taking(settings) as taker:
        taker.channel.tally = tally
        assert take_off(taker) == sent
    # then
    assert told_ns(client) == 5_000_000


def test_what_jobs_used_is_told_once_though_the_connection_is_lost_after_it(
    client: redis.Redis, settings: Settings, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a server that has forgotten the script, and is gone when it is to learn it
    def cut_off(*_: Any) -> Any:
        raise ConnectionResetError("Connection reset by peer")

    monkeypatch.setattr("app.broker.tally.PAUSE_S", 0)
    sent = send(client, 2)
    client.script_flush()
    tally.note(MILL, Used(64, 64, 64 * 5_000_000))
    with taking(settings) as taker, monkeypatch.context() as lost:
        taker.channel.tally = tally
        taker.channel._long.add(QUEUE)
        lost.setattr("app.broker.fetching.Fetcher.load_and_repeat", cut_off)
        # when
        with pytest.raises(ConnectionResetError):
            taker.channel.settle()
    # then
    assert told_ns(client) == 5_000_000
    assert not tally.is_due
    assert client.llen(f"mill:{QUEUE}") == len(sent)


def test_without_the_right_to_tell_what_jobs_used_messages_come_and_go_and_it_is_told_later(
    client: redis.Redis, settings: Settings, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    monkeypatch.setattr("app.broker.tally.PAUSE_S", 0)
    client.acl_setuser("miller", enabled=True, commands=["-eval"])
    sent = send(client, 3)
    tally.note(MILL, Used(64, 64, 64 * 5_000_000))
    with taking(settings) as taker:
        taker.channel.tally = tally
        # when
        assert take_off(taker) == sent
        # then
        assert unacked(client) == told_ns(client) == 0
        client.acl_setuser("miller", enabled=True, commands=["+eval"])
        sent = send(client, 1)
        assert take_off(taker) == sent
        assert told_ns(client) == 5_000_000


def take_off(taker: Taker) -> list[str]:
    """Take all there is, and have done with it."""
    taken = taker.take_all()
    while taker.held:
        taker.held.pop().ack()
    return taken


def test_what_was_fetched_goes_back_in_its_order_when_its_worker_leaves(
    client: redis.Redis, settings: Settings
) -> None:
    sent = send(client, 20)
    with taking(settings, most=10) as taker:
        assert taker.take_all() == sent[:10]
        taker.held[0].ack()

    assert unacked(client) == 0
    with taking(settings) as another:
        assert another.take_all() == sent[1:]


def test_messages_whose_fetch_was_not_answered_go_back_too(
    client: redis.Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a server that does what it is asked and is cut off before it says so
    sent = send(client, 20)
    execute = redis.client.Pipeline.execute

    def cut_off(pipe: Any, *given: Any, **named: Any) -> Any:
        replies = execute(pipe, *given, **named)
        if any(isinstance(reply, list) for reply in replies):
            raise ConnectionResetError("Connection reset by peer")
        return replies

    with taking(settings, most=10) as taker:
        taker.take_all()
        taker.held[0].ack()  # the script is known now
        monkeypatch.setattr(redis.client.Pipeline, "execute", cut_off)
        taker.channel._long.add(QUEUE)
        # when it takes more
        with pytest.raises(ConnectionResetError):
            taker.held[1].ack()
        monkeypatch.undo()

    # then nothing is lost with the connection
    assert unacked(client) == 0
    with taking(settings) as another:
        assert sorted(another.take_all()) == sorted(sent[2:])


def test_one_of_sixteen_messages_is_a_patient_one_however_many_urgent_ones_there_are(
    client: redis.Redis, settings: Settings
) -> None:
    # given a flood of urgent messages, which never ends, and few patient ones
    patient = send(client, 10, priority=9)
    send(client, 1_000)
    with taking(settings, most=20) as taker:
        # when a worker takes and finishes one after the other
        for _ in range(12 * PATIENT_SHARE):
            if len(taker.held) < 20:
                taker.take_all()
            taker.held.pop(0).ack()
            send(client, 1)
        # then the patient ones were among them, by their share
        left = client.llen(Layout(prefix="mill:").key(QUEUE, 9))
        assert left == 0
        assert not set(patient) & set(taker.ids[20:])


def test_urgent_messages_of_one_fetch_come_before_the_patient_ones(
    client: redis.Redis, settings: Settings
) -> None:
    last, middle, first = (send(client, 3, priority) for priority in (9, 5, 0))
    with taking(settings) as taker:
        assert taker.take_all() == [*first, *middle, *last]


def test_what_is_no_message_is_dropped_and_not_given_back_for_ever(
    client: redis.Redis, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    send(client, 1)
    client.lpush(f"mill:{QUEUE}", b"secret \xff", b'{"secret": 1}],[[', b"[]")
    sent = send(client, 1)
    refused: list[bytes] = []
    with taking(settings) as taker:

        def read(queue: str, item: bytes) -> dict[str, Any] | None:
            if b"headers" in item:
                return type(taker.channel).read(queue, item)
            refused.append(item)
            return None

        taker.channel.read = read
        with caplog.at_level(logging.DEBUG):
            assert taker.take_all()[1:] == sent
        # one whose worker died before it could say so
        client.hset("mill:unacked", "tag", b'[secret \xff,"","q"]')
        client.zadd("mill:unacked_index", {"tag": 1})
        taker.channel.qos.restore_visible(interval=1)

    assert len(refused) == 3
    assert unacked(client) == 0
    assert "secret" not in caplog.text


def test_without_the_right_to_fetch_messages_are_taken_one_by_one(
    client: redis.Redis, settings: Settings
) -> None:
    client.acl_setuser("miller", enabled=True, commands=["-rpop"])
    sent = send(client, 5)
    with taking(settings) as taker:
        assert taker.take_all() == sent
        assert unacked(client) == 5


def test_a_worker_that_has_room_for_one_message_takes_one(
    client: redis.Redis, settings: Settings
) -> None:
    sent = send(client, 3)
    with taking(settings, most=1) as taker:
        for number in (1, 2, 3):
            assert taker.take_all() == sent[:number]
            assert unacked(client) == 1
            taker.held[-1].ack()
    assert unacked(client) == 0


def send_together(client: redis.Redis, number: int, size: int) -> None:
    """So many messages of so many jobs each."""
    for _ in range(number):
        more = [str(uuid4()) for _ in range(size - 1)]
        headers = {"task": "inference.generate", "id": str(uuid4()), "more": more, "num_jobs": size}
        message = {"body": "[[], {}, {}]", "headers": headers, "properties": {}}
        properties = {"delivery_tag": "x", "delivery_info": {"exchange": "", "routing_key": QUEUE}}
        item = message | {"properties": properties, "content-type": "application/json"}
        client.lpush(f"mill:{QUEUE}", json.dumps(item))


def test_messages_of_many_jobs_are_held_by_their_jobs(
    client: redis.Redis, settings: Settings
) -> None:
    # given messages of 30 jobs, and a worker that holds 100
    send_together(client, 10, 30)
    with taking(settings, most=100) as taker:
        # when it takes
        assert len(taker.take_all()) == 4  # the last one went beyond it
        # then what is done of one makes no room until there is some
        tag = taker.held[0].delivery_tag
        for _ in range(20):
            taker.channel.qos.lighten(tag)
        assert len(taker.take_all()) == 4
        taker.channel.qos.lighten(tag)
        assert len(taker.take_all()) == 5


def test_a_patient_message_of_many_jobs_takes_no_more_than_its_share_in_the_long_run(
    client: redis.Redis, settings: Settings
) -> None:
    send(client, 400)
    send_together(client, 20, 30)
    for item in client.lrange(f"mill:{QUEUE}", 0, 19):
        client.lpush(Layout(prefix="mill:").key(QUEUE, 9), item)
    client.ltrim(f"mill:{QUEUE}", 20, -1)
    with taking(settings, most=20) as taker:
        for _ in range(400):
            if not taker.held:
                taker.take_all()
            taker.held.pop(0).ack()
            if not client.llen(f"mill:{QUEUE}"):
                break

        left = client.llen(Layout(prefix="mill:").key(QUEUE, 9))
        assert 18 <= left < 20


def test_what_nobody_acknowledges_is_not_noted(client: redis.Redis, settings: Settings) -> None:
    sent = send(client, 3)
    with make_app(settings) as app, app.connection_for_read() as connection:
        held: list[Any] = []
        queue: Any = Queue
        make: Any = Consumer
        queues = [queue(QUEUE, exchange="", routing_key=QUEUE)]
        with make(connection, queues, on_message=held.append, no_ack=True):
            for _ in sent:
                connection.drain_events(timeout=5)

    assert [message.headers["id"] for message in held] == sent
    assert unacked(client) == 0
