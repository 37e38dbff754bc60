"""What is wrong with a message is found on its raw bytes, before kombu can trip over it."""

from __future__ import annotations

import base64
import json

import pytest

from app.broker.message import raw_message
from app.errors import RequestError, RequestTooLarge
from app.jobs import Kind
from app.worker.pool import envelope
from tests.bad_messages import ODD, PROMPT, UNPARSABLE, UNRUNNABLE, message, with_property


@pytest.mark.parametrize("item", UNPARSABLE.values(), ids=UNPARSABLE)
def test_what_kombu_could_not_stand_is_refused_without_quoting_it(item: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        envelope.checked(item, "q", max_bytes=1_000_000)

    assert PROMPT not in str(refused.value)


def test_a_message_beyond_the_limit_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(RequestTooLarge):
        envelope.checked(b"[" * 1_001, "q", max_bytes=1_000)


@pytest.mark.parametrize(
    "item",
    [
        message(),
        message(headers=...),
        message(headers={}),
        message(body=base64.encodebytes(b"[[], {}, {}]" * 20).decode()),
        with_property("priority", "high"),
        *UNRUNNABLE.values(),
    ],
    ids=["plain", "no headers", "empty headers", "base64 in lines", "odd priority", *UNRUNNABLE],
)
def test_what_kombu_can_parse_passes_and_is_left_to_intake(item: bytes) -> None:
    sent = json.loads(item)

    given = envelope.checked(item, "q", max_bytes=10_000)

    assert given == sent | {"headers": sent.get("headers", {})}


@pytest.mark.parametrize("item", ODD.values(), ids=ODD)
def test_what_is_odd_and_harmless_is_put_right(item: bytes) -> None:
    # when an envelope comes that kombu could not take, give back or acknowledge
    given = envelope.checked(item, "celery", max_bytes=10_000)

    # then it gets one with a tag, a way back and a priority that it can stand
    properties = given["properties"]
    assert properties["delivery_tag"].encode()
    assert {"exchange", "routing_key"} <= properties["delivery_info"].keys()
    assert properties["delivery_info"]["routing_key"] in ("q", "celery")
    assert min(max(int(properties.get("priority", 0)), 0), 9) == properties.get("priority", 0)
    assert given["body"] == json.loads(item)["body"]


@pytest.mark.parametrize("task_id", ["00000000-0000-4000-8000-000000000000", "order 42", "x" * 255])
def test_the_task_id_is_found_without_parsing(task_id: str) -> None:
    item = raw_message(task_id, Kind.GENERATE, {"prompt": PROMPT}, queue="q")

    assert envelope.task_id_in(item) == task_id
    assert envelope.task_id_in(item[:-20]) == task_id  # cut off: not JSON any more


@pytest.mark.parametrize(
    "item",
    [
        b"",
        b'{"headers": {"id": 5}}',
        b'{"headers": {"id": ""}}',
        b'{"headers": {"id": "%s"}}' % (b"x" * 256),
        b'{"headers": {"root_id": "x"}}',
        b'{"headers": {"id": "\xff"}}',
        json.dumps({"body": json.dumps([[], {"id": "in the prompt"}, {}])}).encode(),
    ],
)
def test_where_no_task_id_can_be_read_there_is_none(item: bytes) -> None:
    assert envelope.task_id_in(item) is None


def test_a_message_whose_headers_have_another_name_is_refused_with_its_task_id() -> None:
    # given
    refused: list[tuple[str | None, RequestError]] = []
    read = envelope.reader(10_000, lambda task_id, error: refused.append((task_id, error)))
    item = raw_message("order 42", Kind.GENERATE, {"prompt": PROMPT}, queue="q")
    # when
    payload = read("q", item.replace(b'"headers"', b'"heade2s"'))
    # then
    [(task_id, error)] = refused
    assert payload is None
    assert task_id == "order 42"
    assert error.param == "headers"
