"""How many messages of each model a worker holds, and what becomes of the others: Redis alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
from kombu.entity import Queue
from kombu.messaging import Consumer

from app.broker.app import make_app
from app.broker.message import raw_message
from app.broker.queues import Layout, queue_name
from app.config.settings import ModelSettings, Settings
from app.jobs import Kind
from tests.own_redis import OwnRedis, running_redis
from tests.pushed import push

STUB = {"source": "stub", "kind": "generate", "engine": "stub", "max_batch_size": 2}
BUDGET = 4
"""Two batches of a model's own queue."""
SHARED = 2
"""And one of what came by a queue of all."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OwnRedis]:
    with running_redis(tmp_path) as server:
        yield server


@pytest.fixture
def client(server: OwnRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("ACL", "SETUSER", "miller", "on", ">flour", "~*", "&*", "+@all")
        yield client


@pytest.fixture
def settings(make_settings: Callable[..., Settings], server: OwnRedis) -> Settings:
    models = {name: ModelSettings.model_validate(STUB) for name in ("busy", "idle")}
    url = server.url.replace("://", "://miller:flour@")
    return make_settings(broker={"url": url}, models=models)


class Taker:
    """A channel that takes messages as a worker does and holds them until they are acknowledged."""

    def __init__(self, settings: Settings, connection: Any) -> None:
        self._connection = connection
        self.channel = connection.channel()
        self.held: list[tuple[str, Any]] = []
        names = [*map(queue_name, settings.models), settings.broker.default_queue]
        queue: Any = Queue
        queues = [queue(name, exchange="", routing_key=name) for name in names]
        make: Any = Consumer
        consumer = make(self.channel, queues, on_message=self._take, accept=["json"])
        consumer.qos(prefetch_count=2 * (BUDGET + SHARED))
        consumer.consume()

    def _take(self, message: Any) -> None:
        model = message.decode()[1]["model"]
        if self.channel.keeps(message, queue_name(model)):
            self.held.append((model, message))

    def take_all(self) -> list[str]:
        """Take until nothing comes any more; the models of what is held."""
        try:
            while True:
                self._connection.drain_events(timeout=0.3)
        except TimeoutError:
            return [model for model, _ in self.held]

    def finish_one(self) -> str:
        model, message = self.held.pop(0)
        message.ack()
        return model


@pytest.fixture
def taker(settings: Settings) -> Iterator[Taker]:
    with make_app(settings) as app, app.connection_for_read() as connection:
        yield Taker(settings, connection)


def test_a_flood_of_plain_messages_for_one_model_does_not_hold_up_those_for_another(
    client: redis.Redis, taker: Taker
) -> None:
    flood = push(client, "celery", "busy", 300)
    push(client, "celery", "idle", 3)

    held = taker.take_all()

    assert held.count("idle") == 3
    assert held.count("busy") == BUDGET + SHARED
    # The others wait in their model's own queue, in their order.
    assert client.llen("celery") == 0
    waiting = client.lrange("gristmill.busy", 0, -1)[::-1]
    assert [next(each for each in flood if each.encode() in item) for item in waiting] == flood[6:]
    assert client.hlen("unacked") == len(held)


def test_a_message_that_went_on_to_its_models_queue_keeps_its_priority_and_is_taken_from_there(
    client: redis.Redis, taker: Taker
) -> None:
    push(client, "celery", "busy", SHARED + BUDGET)
    taker.take_all()
    [urgent] = push(client, "celery", "busy", 1, priority=9)
    taker.take_all()
    [item] = client.lrange(Layout().key("gristmill.busy", 9), 0, -1)
    assert urgent.encode() in item

    for _ in range(SHARED + 1):
        taker.finish_one()

    assert len(taker.take_all()) == BUDGET
    assert client.llen(Layout().key("gristmill.busy", 9)) == 0


def test_messages_of_a_producer_with_an_exchange_of_its_own_count_for_their_model(
    client: redis.Redis, taker: Taker
) -> None:
    for _ in range(10):
        body = {"prompt": "x", "model": "busy"}
        client.lpush("celery", raw_message(uuid4(), Kind.GENERATE, body, queue="their-key"))
    push(client, "gristmill.busy", "busy", 10)

    assert len(taker.take_all()) <= SHARED + BUDGET + 1  # one was asked for before


def test_plain_messages_do_not_wait_behind_the_backlog_of_their_models_own_queue(
    client: redis.Redis, taker: Taker
) -> None:
    push(client, "gristmill.busy", "busy", 200)
    taker.take_all()

    push(client, "celery", "busy", SHARED)

    assert len(taker.take_all()) == BUDGET + SHARED
    assert client.llen("gristmill.busy") == 200 - BUDGET


def test_a_worker_that_holds_what_it_may_does_not_ask_for_more_again_and_again(
    client: redis.Redis, taker: Taker
) -> None:
    push(client, "gristmill.busy", "busy", 200)
    taker.take_all()
    client.config_resetstat()

    taker.take_all()

    stats = client.info("commandstats")
    assert stats.get("cmdstat_brpop", {"calls": 0})["calls"] <= 1


def test_a_queue_that_has_room_again_is_looked_at_while_another_is_waited_for(
    client: redis.Redis, taker: Taker
) -> None:
    push(client, "gristmill.busy", "busy", BUDGET)
    taker.take_all()
    assert not taker.channel.missed

    for _ in range(BUDGET):
        taker.finish_one()
    assert taker.channel.missed == {"gristmill.busy"}
    push(client, "gristmill.busy", "busy", 1)
    taker.channel.settle()  # as each turn of the hub does

    assert [model for model, _ in taker.held] == ["busy"]


def test_a_full_redis_takes_no_message_back_so_a_worker_keeps_what_it_took(
    client: redis.Redis, taker: Taker
) -> None:
    push(client, "celery", "busy", SHARED + BUDGET + 2)
    client.config_set("maxmemory", 1)

    assert len(taker.take_all()) == SHARED + BUDGET + 2


@pytest.mark.parametrize(
    "refused", [["zadd"], ["hset"], ["hdel"], ["zrem"], ["zadd", "hset", "hdel", "zrem"]]
)
def test_a_right_to_keep_notes_that_is_taken_costs_no_place_and_is_said_once(
    refused: list[str], client: redis.Redis, taker: Taker, caplog: pytest.LogCaptureFixture
) -> None:
    client.acl_setuser("miller", enabled=True, commands=[f"-{name}" for name in refused])
    push(client, "gristmill.busy", "busy", 40)

    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            assert len(taker.take_all()) == BUDGET
            taker.finish_one()

    assert len(taker.take_all()) == BUDGET
    # Said by an earlier test, it is not said again.
    assert sum("NOPERM" in text for text in caplog.messages) <= 2 * len(refused)
