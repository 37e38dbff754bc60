"""What the transport says when Redis is away, and when a turn of the hub is over."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final

import pytest
from kombu.asynchronous import Hub
from kombu.transport import redis
from redis import ConnectionPool
from redis.exceptions import RedisError

from app.broker.transport import (
    ASK_S,
    LOOK_AGAIN_S,
    Channel,
    Message,
    SentinelChannel,
    SentinelTransport,
    Turns,
    _Turning,
)

BUDGET: Final = 4


class LostChannel:
    no_ack_consumers: frozenset[str] = frozenset()

    def decode_body(self, body: str, encoding: str | None = None) -> str:
        return body

    def basic_ack(self, *_: object, **__: object) -> None:
        raise ConnectionResetError("Connection reset by peer")

    def basic_reject(self, *_: object, **__: object) -> None:
        raise RedisError("READONLY You can't write against a read only replica.")


PAYLOAD = {"body": "secret", "properties": {"delivery_tag": "t"}, "content-type": "text/plain"}


@pytest.mark.parametrize("settle", ["ack_log_error", "reject_log_error"])
def test_a_message_that_cannot_be_settled_is_a_word_in_the_log_and_no_traceback(
    settle: str, caplog: pytest.LogCaptureFixture
) -> None:
    # given
    assert Channel.Message is Message
    message = Message(PAYLOAD, channel=LostChannel())
    # when
    with caplog.at_level(logging.WARNING):
        getattr(message, settle)(logging.getLogger("celery"), (OSError, RedisError))
    # then
    [record] = caplog.records
    assert "it comes again" in record.getMessage()
    assert record.levelno == logging.WARNING
    assert record.exc_info is None
    assert "secret" not in caplog.text


@pytest.fixture
def loop() -> Iterator[Hub]:
    loop = Hub()
    yield loop
    loop.close()


class Hubless:
    def __init__(self) -> None:
        self.cycle = redis.MultiChannelPoller()

    def register_with_event_loop(self, connection: object, loop: Hub) -> None:
        """As kombu does."""
        looks = loop.call_repeatedly(1, self.cycle.maybe_refresh_binding_expiry)
        self.cycle._binding_expiry_tref = looks


class Turning(_Turning, Hubless):
    def __init__(self, told: list[str], missed: set[str] | None = None) -> None:
        super().__init__()

        def settle() -> None:
            told.append("messages are delivered")

        self.channels = [SimpleNamespace(settle=settle, missed=missed or set())]
        self.after_turn = lambda: told.append("the runner is woken")


def test_whoever_waits_for_messages_is_woken_once_all_of_a_turn_are_delivered(
    loop: Hub,
) -> None:
    # given
    told: list[str] = []
    Turning(told).register_with_event_loop(None, loop)
    # when
    for tick in loop.on_tick:
        tick()
    # then
    assert told == ["messages are delivered", "the runner is woken"]


def test_a_queue_that_nobody_waits_for_and_that_has_room_has_the_hub_turn_again_soon(
    loop: Hub,
) -> None:
    # given a hub that would wait for a second
    waits: list[float] = []
    wake_out, wake_in = os.pipe()
    loop.add_reader(wake_out, os.read, wake_out, 1)
    poll = loop.poller.poll
    loop.poller.poll = lambda wait_s: [waits.append(wait_s), poll(wait_s)][1]
    turning = Turning([], missed={"gristmill.stub"})
    ended: list[int] = []
    turning.end_wait = lambda: ended.append(os.write(wake_in, b"!"))
    turning.register_with_event_loop(None, loop)
    turns = loop.loop
    # when
    for _ in range(3):
        next(turns)
    # then the first wait is ended at once, and those after it are short
    assert len(ended) == 1
    assert max(waits[1:]) <= LOOK_AGAIN_S
    os.close(wake_out)
    os.close(wake_in)


def test_the_hub_is_asked_once_for_each_look(loop: Hub) -> None:
    # given
    asked: list[float] = []
    loop.call_later = lambda wait_s, _: asked.append(wait_s)
    Turning([], missed={"gristmill.stub"}).register_with_event_loop(None, loop)
    # when
    for tick in [*loop.on_tick] * 3:
        tick()
    # then
    assert asked == [LOOK_AGAIN_S]


def test_bindings_that_last_for_an_hour_are_not_looked_at_every_second(loop: Hub) -> None:
    # when
    Turning([]).register_with_event_loop(None, loop)
    # then
    [due] = [each for each in loop.timer._queue if not each.entry.canceled]
    assert due.eta - time.monotonic() > 2


@pytest.mark.parametrize(
    ("held", "loop", "wait_s"),
    [(0, "a hub", ASK_S), (0, None, 1), (BUDGET, "a hub", 1), (2 * BUDGET, "a hub", LOOK_AGAIN_S)],
)
def test_a_worker_asks_anew_seldom_but_where_it_leaves_out_what_it_has_enough_of(
    held: int, loop: object, wait_s: float
) -> None:
    # given a queue with room, and one of which so many jobs are held
    sent: list[tuple[Any, ...]] = []
    channel = object.__new__(Channel)
    channel.connection = SimpleNamespace(loop=loop)
    channel._active_queues, channel.active_fanout_queues = ["idle", "busy"], set()
    channel._queue_cycle = Turns(channel)
    channel._queue_cycle.update(channel._active_queues)
    channel._qos = SimpleNamespace(held=Counter(busy=held))
    channel.queue_budgets = {"busy": BUDGET}
    channel.brpop_timeout = redis.Transport.brpop_timeout
    channel.global_keyprefix = ""
    connection = SimpleNamespace(send_command=lambda *words: sent.append(words))
    channel.client = SimpleNamespace(connection=connection)
    # when
    channel._brpop_start()
    # then
    assert sent[0][-1] == wait_s


def test_a_channel_makes_one_plain_client_for_as_long_as_it_keeps_its_connections() -> None:
    # given
    channel = object.__new__(Channel)
    channel._plain, channel._pool = None, ConnectionPool()
    # when
    before, again = channel.plain, channel.plain
    channel._pool = ConnectionPool()
    # then
    assert again is before
    assert channel.plain.connection_pool is channel._pool


def test_what_a_channel_does_after_its_sentinels_are_forgotten_is_a_connection_error() -> None:
    # given
    channel = object.__new__(SentinelChannel)
    channel.connection = SimpleNamespace(client=None)
    channel._known = {False: {"db": 0}}
    # then Celery takes it for one, and connects anew
    with pytest.raises(SentinelTransport.connection_errors):
        _ = channel.pool
