"""What a message carries of the requests of its jobs."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest

from app.broker import publisher
from app.broker.message import Message
from app.broker.publisher import carried
from app.jobs import Kind

MOST = 1_000


def message(prompt: str | None) -> Message:
    request: dict[str, Any] | None = None if prompt is None else {"prompt": prompt}
    return Message(uuid4(), Kind.GENERATE, "stub", request, "/v1/completions")


def test_a_small_request_travels_in_its_message_and_a_large_one_stays_in_its_row() -> None:
    largest = "x" * (MOST - len('{"prompt": ""}'))
    larger_as_sent = "é" * (MOST // 5)  # two bytes here, six there

    assert carried([message(largest)], MOST) == {"prompt": largest, "url": "/v1/completions"}
    assert carried([message(largest + "x")], MOST) == {}
    assert carried([message(larger_as_sent)], MOST) == {}
    assert carried([message(None)], MOST) == {}


def test_requests_of_jobs_that_share_a_message_are_not_even_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publisher.json, "dumps", lambda _: pytest.fail("It was written out."))

    assert carried([message("x"), message("y")], MOST) == {}


def test_without_room_in_messages_no_prompt_is_in_redis() -> None:
    assert carried([message("x")], 0) == {}
