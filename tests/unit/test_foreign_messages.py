"""Clients in other languages are understood as they are."""

from __future__ import annotations

from collections.abc import Callable
from uuid import uuid4

import pytest
from kombu import Connection
from kombu.transport.virtual import Message

from app.config.settings import Settings
from app.jobs import job_id_of
from app.worker.pool import envelope
from app.worker.pool.arrivals import identify, read
from tests.foreign_messages import ETA, EXPIRES, FOREIGN, item


@pytest.mark.parametrize("name", FOREIGN)
def test_a_message_of_another_language_is_read_as_its_client_meant_it(
    name: str, make_settings: Callable[..., Settings]
) -> None:
    # given what the client pushes
    task_id, recorded = str(uuid4()), FOREIGN[name]
    pushed = item(recorded, task_id, {"prompt": "flour", "max_tokens": 3})

    # when kombu and the worker read it
    given = envelope.checked(pushed, "celery", 1_000_000)
    with Connection("memory://") as connection:
        message = Message(given, channel=connection.default_channel)
    config = make_settings()
    arrival = read(message, *identify(message, config), config)

    # then it is the job that was meant
    assert arrival.job_id == job_id_of(task_id)
    assert arrival.request is not None
    assert arrival.request.prompts == ["flour"]
    assert arrival.request.max_tokens == 3
    assert arrival.priority == 0
    times = (ETA, EXPIRES) if recorded.has_times else (None, None)
    assert (arrival.not_before, arrival.deadline) == times
    assert arrival.time_limit_s == recorded.time_limit_s
