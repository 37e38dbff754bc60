"""What is wrong with a message is found on its raw bytes, before kombu can trip over it."""

from __future__ import annotations

import base64
import json
from typing import Any
from uuid import uuid4

import pytest

from app import broker
from app.engines.base import Kind
from app.errors import RequestError, RequestTooLarge
from app.worker import envelope

PROMPT = "the miller's secret"


def message(**changes: Any) -> bytes:
    """A good message with some fields changed; `...` takes a field out."""
    item = json.loads(broker.raw_message(uuid4(), Kind.GENERATE, {"prompt": PROMPT}, queue="q"))
    return json.dumps(_changed(item, changes)).encode()


def with_property(name: str, value: Any) -> bytes:
    item = json.loads(message())
    return message(properties=_changed(item["properties"], {name: value}))


def _changed(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in (fields | changes).items() if value is not ...}


WRONG = {
    "nothing at all": b"",
    "text": PROMPT.encode(),
    "bytes": b"\xff\xfe\x00",
    "JSON in UTF-16": message().decode().encode("utf-16"),
    "a number": b"42",
    "null": b"null",
    "a list": b"[1]",
    "a string": json.dumps(PROMPT).encode(),
    "an empty object": b"{}",
    "lists without end": b"[" * 200_000,
    "a number of 5000 digits": message(x=1).replace(b'"x": 1', b'"x": ' + b"1" * 5000),
    "a type that kombu does not know": message(x={"__type__": PROMPT, "__value__": 1}),
    "a type that kombu cannot make": message(x={"__type__": "uuid", "__value__": 1}),
    "no properties": message(properties=...),
    "properties null": message(properties=None),
    "properties a list": message(properties=[PROMPT]),
    "no delivery tag": with_property("delivery_tag", ...),
    "delivery tag null": with_property("delivery_tag", None),
    "delivery tag empty": with_property("delivery_tag", ""),
    "delivery tag a list": with_property("delivery_tag", [1]),
    "no delivery info": with_property("delivery_info", ...),
    "delivery info a string": with_property("delivery_info", "q"),
    "delivery info empty": with_property("delivery_info", {}),
    "no body encoding": with_property("body_encoding", ...),
    "unknown body encoding": with_property("body_encoding", "rot13"),
    "body encoding a number": with_property("body_encoding", 3),
    "headers a string": message(headers=PROMPT),
    "headers a list": message(headers=[PROMPT]),
    "a compressed body": message(headers={"compression": "application/x-gzip"}),
    "no body": message(body=...),
    "body a number": message(body=5),
    "body an object": message(body={"prompt": PROMPT}),
    "body a list": message(body=[[], {"prompt": PROMPT}, {}]),
    "body not base64": message(body="QUJ"),
    "body beyond ASCII": message(body="größer"),
}


@pytest.mark.parametrize("item", WRONG.values(), ids=WRONG)
def test_what_kombu_could_not_stand_is_refused_without_quoting_it(item: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        envelope.check(item, max_bytes=1_000_000)

    assert PROMPT not in str(refused.value)


def test_a_message_beyond_the_limit_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(RequestTooLarge):
        envelope.check(b"[" * 1_001, max_bytes=1_000)


@pytest.mark.parametrize(
    "item",
    [
        message(),
        message(headers=...),
        message(headers={}),
        message(body=base64.encodebytes(b"[[], {}, {}]" * 20).decode()),
        with_property("priority", "high"),
    ],
    ids=["plain", "no headers", "empty headers", "base64 in lines", "odd priority"],
)
def test_what_kombu_can_parse_passes_and_is_left_to_intake(item: bytes) -> None:
    envelope.check(item, max_bytes=10_000)


@pytest.mark.parametrize("task_id", [str(uuid4()), "order 42", "x" * 255])
def test_the_task_id_is_found_without_parsing(task_id: str) -> None:
    item = broker.raw_message(task_id, Kind.GENERATE, {"prompt": PROMPT}, queue="q")

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
