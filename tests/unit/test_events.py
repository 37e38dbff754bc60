"""Task events are collected by any thread and sent by the hub's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kombu import Connection

from app.broker.app import make_app
from app.config.settings import Settings
from app.worker.pool import events
from app.worker.pool.events import EventDispatcher


@pytest.fixture
def dispatcher() -> Iterator[EventDispatcher]:
    app = make_app(Settings())
    with Connection("memory://") as connection:
        connection.default_channel.num_heard = 1
        yield app.events.Dispatcher(
            connection, buffer_group=["task"], on_send_buffered=lambda: None
        )


def test_whoever_tells_of_a_task_never_sends_the_events_himself(
    dispatcher: EventDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    sent: list[object] = []
    monkeypatch.setattr(dispatcher, "_publish", lambda event, *_, **__: sent.append(event))

    # when
    for number in range(1_000):
        dispatcher.send("task-started", uuid=str(number))

    # then
    assert not sent
    dispatcher.flush()
    assert [len(group) for group in sent] == [1_000]


def test_events_that_cannot_be_sent_are_bounded_and_the_newest_stay(
    dispatcher: EventDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    monkeypatch.setattr(events, "MAX_EVENTS", 10)
    sent: list[list[dict[str, object]]] = []
    monkeypatch.setattr(dispatcher, "_publish", lambda event, *_, **__: sent.append(event))

    # when
    for number in range(100):
        dispatcher.send("task-started", uuid=str(number))
    dispatcher.flush()

    # then
    assert [event["uuid"] for event in sent[0]] == [str(number) for number in range(90, 100)]


def test_while_nobody_listens_no_task_events_are_made_until_a_heartbeat_is_heard(
    dispatcher: EventDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    sent: list[object] = []
    producer = dispatcher.producer
    monkeypatch.setattr(producer, "publish", lambda event, **_: sent.append(event))

    def told(num_heard: int) -> list[object]:
        sent.clear()
        producer.channel.num_heard = num_heard
        dispatcher.send("worker-heartbeat")
        dispatcher.send("task-started", uuid="one")
        dispatcher.flush()
        return [each["type"] if isinstance(each, dict) else len(each) for each in sent]

    # when, then
    assert told(1) == ["worker-heartbeat", 1]
    assert told(0) == ["worker-heartbeat"]
    assert told(1) == ["worker-heartbeat", 1]
