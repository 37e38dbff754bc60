"""What the transport says when Redis is away, and when a turn of the hub is over."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from redis import ConnectionPool
from redis.exceptions import RedisError

from app.broker.transport import LOOK_AGAIN_S, Channel, Message, _Turning


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


class Hubless:
    def register_with_event_loop(self, connection: object, loop: object) -> None:
        pass


class Turning(_Turning, Hubless):
    def __init__(self, told: list[str], missed: set[str] | None = None) -> None:
        def settle() -> None:
            told.append("messages are delivered")

        self.channels = [SimpleNamespace(settle=settle, missed=missed or set())]
        self.after_turn = lambda: told.append("the runner is woken")


def test_whoever_waits_for_messages_is_woken_once_all_of_a_turn_are_delivered() -> None:
    # given
    told: list[str] = []
    loop = SimpleNamespace(on_tick=set())
    Turning(told).register_with_event_loop(None, loop)
    # when
    for tick in loop.on_tick:
        tick()
    # then
    assert told == ["messages are delivered", "the runner is woken"]


def test_a_queue_that_nobody_waits_for_and_that_has_room_has_the_hub_turn_again_soon() -> None:
    # given
    asked: list[float] = []
    loop = SimpleNamespace(on_tick=set(), call_later=lambda wait_s, _: asked.append(wait_s))
    Turning([], missed={"gristmill.stub"}).register_with_event_loop(None, loop)
    # when
    for tick in [*loop.on_tick] * 3:
        tick()
    # then
    assert asked == [LOOK_AGAIN_S]


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
