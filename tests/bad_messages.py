"""List items that a service might push into Redis by mistake or malice.

`UNPARSABLE` end a plain Celery worker while kombu parses them; `UNRUNNABLE` pass kombu, and end it
later, are logged whole, or are dropped without a word.
"""

from __future__ import annotations

import base64
import json
import math
import pickle
from typing import Any
from uuid import uuid4

from app.broker.message import raw_message
from app.jobs import Kind

PROMPT = "the miller's secret"


def message(**changes: Any) -> bytes:
    """A good message with some fields changed; `...` takes a field out."""
    item = json.loads(raw_message(uuid4(), Kind.GENERATE, {"prompt": PROMPT}, queue="q"))
    return json.dumps(_changed(item, changes)).encode()


def with_property(name: str, value: Any) -> bytes:
    item = json.loads(message())
    return message(properties=_changed(item["properties"], {name: value}))


def _changed(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in (fields | changes).items() if value is not ...}


UNPARSABLE = {
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
    "properties a list": message(properties=[PROMPT]),
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


PLAIN = json.dumps([[], {"prompt": PROMPT}, {}])
ODD = {
    "no properties": message(properties=..., body=PLAIN),
    "properties null": message(properties=None, body=PLAIN),
    "no delivery tag": with_property("delivery_tag", ...),
    "delivery tag null": with_property("delivery_tag", None),
    "delivery tag empty": with_property("delivery_tag", ""),
    "delivery tag a list": with_property("delivery_tag", [1]),
    "delivery tag half a surrogate pair": with_property("delivery_tag", "\ud800"),
    "no delivery info": with_property("delivery_info", ...),
    "delivery info a string": with_property("delivery_info", "q"),
    "delivery info empty": with_property("delivery_info", {}),
    "routing key half a surrogate pair": with_property(
        "delivery_info", {"exchange": "", "routing_key": "\udfff"}
    ),
    "priority without end": with_property("priority", math.inf),
    "priority beyond a float": with_property("priority", 5).replace(b'": 5', b'": 1e999'),
    "priority not a number": with_property("priority", math.nan),
    "priority a list": with_property("priority", [3]),
    "priority an object": with_property("priority", {}),
}
"""What kombu could not stand and does no harm once it is put right."""


def with_header(name: str, value: Any) -> bytes:
    item = json.loads(message())
    return message(headers=_changed(item["headers"], {name: value}))


def with_body(value: Any) -> bytes:
    return message(body=base64.b64encode(json.dumps(value).encode()).decode())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


UNRUNNABLE = {
    "body not JSON": message(body=_base64(PROMPT.encode())),
    "body not UTF-8": message(body=_base64(b"\xff\xff")),
    "body a number": with_body(5),
    "body of two parts": with_body([[], {"prompt": PROMPT}]),
    "positional arguments": with_body([[PROMPT], {}, {}]),
    "args an object": with_body([{"prompt": PROMPT}, {}, {}]),
    "kwargs a list": with_body([[], [PROMPT], {}]),
    "an unknown argument": with_body([[], {"prompt": PROMPT, "color": "red"}, {}]),
    "an unknown argument of half a surrogate pair": with_body(
        [[], {"prompt": PROMPT, "\ud800": 1}, {}]
    ),
    "a prompt of the wrong type": with_body([[], {"prompt": {"text": PROMPT}}, {}]),
    "half a surrogate pair": with_body([[], {"prompt": PROMPT + "\ud800"}, {}]),
    "an unknown model": with_body([[], {"prompt": PROMPT, "model": "gpt-9"}, {}]),
    "a callback": with_body([[], {"prompt": PROMPT}, {"callbacks": [{"task": "x"}]}]),
    "a chain": with_body([[], {"prompt": PROMPT}, {"chain": [{"task": "x"}]}]),
    "pickle": message(
        **{
            "body": _base64(pickle.dumps([[], {"prompt": PROMPT}, {}])),
            "content-type": "application/x-python-serialize",
            "content-encoding": "binary",
        }
    ),
    "an unknown content type": message(**{"content-type": "text/weird"}),
    "no content type": message(**{"content-type": ...}),
    "content type a number": message(**{"content-type": 5}),
    "unknown task": with_header("task", "tasks.add"),
    "a task of Celery's own": with_header("task", "celery.backend_cleanup"),
    "task a number": with_header("task", 5),
    "task a list": with_header("task", ["inference.generate"]),
    "eta no time": with_header("eta", "soon"),
    "eta a number": with_header("eta", 5),
    "expires a list": with_header("expires", []),
    "expires no time": with_header("expires", PROMPT),
    "timelimit a word": with_header("timelimit", "x"),
    "timelimit of three": with_header("timelimit", [1, 2, 3]),
    "timelimit true": with_header("timelimit", [True, None]),
    "timelimit below 0": with_header("timelimit", [-1, None]),
    "timelimit not a number": with_header("timelimit", [math.nan, None]),
    "timelimit without end": with_header("timelimit", [math.inf, None]),
    "more a word": with_header("more", "x"),
    "more of numbers": with_header("more", [1]),
    "more beyond a thousand": with_header("more", ["x"] * 1_000),
    "more half a surrogate pair": with_header("more", ["x", "\ud800"]),
}

NAMELESS = {
    "id half a surrogate pair": with_header("id", "\ud800"),
    "no id": with_header("id", ...),
    "id null": with_header("id", None),
    "id a number": with_header("id", 5),
    "id a list": with_header("id", ["x"]),
    "id an object": with_header("id", {}),
    "no headers": message(headers=...),
    "empty headers": message(headers={}),
}
