"""What Celery knows of a job, and how the end of one reaches its message."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock
from uuid import uuid4

import pytest
from celery.worker import state as celery_state
from celery.worker.request import Request as CeleryRequest
from kombu.message import Message

from app.broker.app import make_app
from app.config.settings import Settings
from app.worker.pool.acks import Acks
from app.worker.pool.arrivals import identify, read

TASK_ID = str(uuid4())
SECRET = "canary-7f3a"


class Hub:
    """A consumer's: what others asked it to do waits here."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], object]] = []
        self.taken: list[Any] = []
        self.sent: list[dict[str, Any]] = []
        eventer = SimpleNamespace(enabled=True, send=self._send, is_heard=True)
        self.consumer: Any = SimpleNamespace(
            hostname="worker@mill",
            event_dispatcher=eventer,
            connection_errors=(),
            on_task_message=set(),
            on_task_request=self.taken.append,
            call_soon_ack=self.soon.append,
            _maximum_prefetch_restored=True,
        )
        self.consumer.acks = Acks(self.consumer)

    def _send(self, type: str, **fields: Any) -> None:
        self.sent.append({"type": type, **fields})

    def turn(self) -> None:
        soon = self.soon[:]
        self.soon.clear()
        for each in soon:
            each()


@pytest.fixture
def hub() -> Hub:
    return Hub()


def delivered(headers: dict[str, Any] | None = None) -> Message:
    return Message(
        body=json.dumps([[], {"prompt": SECRET}, {}]),
        content_type="application/json",
        content_encoding="utf-8",
        headers={"task": "inference.generate", "id": TASK_ID} | (headers or {}),
        properties={"priority": 3},
        delivery_info={"exchange": "", "routing_key": "gristmill.stub"},
    )


def taken(hub: Hub, settings: Settings, message: Message) -> Any:
    """The request that the pool gets of a message."""
    app = make_app(settings)
    task_id, name = identify(message, settings)
    arrival = read(message, task_id, name, settings)
    app.tasks[name].start_strategy(app, hub.consumer)(task_id, arrival, message)
    [request] = hub.taken
    return request


def test_celery_knows_of_a_job_what_it_makes_of_a_message_itself(
    hub: Hub, make_settings: Callable[..., Settings]
) -> None:
    # given
    settings, message = make_settings(), delivered()
    app = make_app(settings)
    empty = Message(
        body="[[], {}, {}]",
        content_type="application/json",
        content_encoding="utf-8",
        headers={"task": "inference.generate", "id": TASK_ID, "argsrepr": "()"},
        properties={"priority": 3},
        delivery_info=message.delivery_info,
    )
    task = app.tasks["inference.generate"]
    theirs = CeleryRequest(empty, app=app, hostname="worker@mill", task=task)

    # when
    ours = taken(hub, settings, message)

    # then
    assert ours.info() == theirs.info()
    assert ours.stamps == theirs.stamps
    assert not ours.revoked()
    assert ours._context.delivery_info == theirs._context.delivery_info
    assert (ours.group, ours.reply_to, ours.correlation_id) == (None, None, None)


def test_celery_sees_neither_prompt_nor_foreign_headers(
    hub: Hub, make_settings: Callable[..., Settings]
) -> None:
    foreign = {"kwargsrepr": SECRET, "argsrepr": SECRET, "origin": SECRET, "eta": None}

    request = taken(hub, make_settings(), delivered(foreign))

    assert SECRET not in json.dumps([request.info(), request.request_dict, hub.sent])
    assert request.kwargsrepr == "(model=stub)"
    assert [event["type"] for event in hub.sent] == ["task-received"]


def test_the_time_limit_of_a_message_is_its_requests(
    hub: Hub, make_settings: Callable[..., Settings]
) -> None:
    request = taken(hub, make_settings(), delivered({"timelimit": [1.5, None]}))

    assert request.time_limits == (1.5, None)


def test_a_job_that_was_revoked_before_it_came_is_acknowledged_and_not_taken(
    hub: Hub, make_settings: Callable[..., Settings]
) -> None:
    settings, message = make_settings(), delivered()
    message.ack_log_error = MagicMock()
    celery_state.revoked.add(TASK_ID)
    try:
        with pytest.raises(ValueError, match="not enough values"):
            taken(hub, settings, message)
    finally:
        celery_state.revoked.discard(TASK_ID)
    hub.turn()

    message.ack_log_error.assert_called_once()


@pytest.mark.parametrize("is_heard", [True, False])
def test_the_result_that_flower_shows_is_made_for_who_listens(
    is_heard: bool, hub: Hub, make_settings: Callable[..., Settings]
) -> None:
    # given
    message = delivered()
    message.ack_log_error = MagicMock()
    hub.consumer.event_dispatcher.is_heard = is_heard
    summary = MagicMock(return_value="{'in': 1}")

    # when
    taken(hub, make_settings(), message).on_success((0, summary, 0.5))

    # then
    assert summary.called is is_heard
    shown = [event["result"] for event in hub.sent if event["type"] == "task-succeeded"]
    assert shown == (["{'in': 1}"] if is_heard else [])


def test_the_hub_is_asked_once_to_settle_all_that_ended_meanwhile(hub: Hub) -> None:
    # given
    settled: list[int] = []

    # when
    for number in range(100):
        hub.consumer.acks.add(settled.append, number)

    # then
    assert len(hub.soon) == 1
    hub.turn()
    assert settled == list(range(100))
    hub.consumer.acks.add(settled.append, 100)
    hub.turn()
    assert settled[-1] == 100


def test_a_message_that_cannot_be_settled_does_not_keep_others_from_it(hub: Hub) -> None:
    # given
    settled: list[int] = []

    def break_() -> None:
        raise BrokenPipeError

    hub.consumer.acks.add(break_)
    hub.consumer.acks.add(settled.append, 1)

    # when
    with pytest.raises(BrokenPipeError):
        hub.turn()
    hub.turn()

    # then
    assert settled == [1]


def test_after_a_reconnect_each_message_that_is_settled_restores_what_celery_takes(
    hub: Hub,
) -> None:
    restored: list[object] = []
    hub.consumer._restore_prefetch_count_after_connection_restart = restored.append
    hub.consumer._maximum_prefetch_restored = False

    for _ in range(3):
        hub.consumer.acks.add(lambda: None)
    hub.turn()

    assert len(restored) == 3
