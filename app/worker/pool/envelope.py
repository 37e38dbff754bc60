"""The check in front of kombu: a list item that it cannot parse would end the worker.

Whoever may write to Redis may push anything. Kombu parses what it takes with no net below: bytes
that are not JSON, or a missing field, are an unrecoverable error of the whole worker, and a
compressed body is unpacked without a limit. So its channel reads each item by `reader`, once: where
something is missing or odd that does no harm, kombu gets the message with that put right (clients
of other languages send all sorts of envelopes), and what it could not stand it never sees.

What is wrong inside a message that kombu can stand is found by `app.worker.pool.arrivals`.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable
from typing import Any, Final
from uuid import uuid4

from kombu.utils.json import object_hook

from app.errors import RequestError, RequestTooLarge
from app.requests.storable import is_unicode

_TASK_ID: Final = re.compile(rb'"id"\s*:\s*"([^"\\\x00-\x1f\x80-\xff]{1,255})"')
_MOST_GROWTH: Final = 4
"""A request in UTF-8 grows up to 3 times as JSON with escapes, and by a third in base64."""
_HEADERS_BYTES: Final = 65_536
_PLAIN: Final = (None, "", "utf-8")


def reader(
    max_request_bytes: int, refuse: Callable[[str | None, RequestError], object]
) -> Callable[[str, bytes], dict[str, Any] | None]:
    """What makes the payload of an item from the list of a queue.

    `refuse(task_id, error)` gets what was held back, with the task id if one can be read, in the
    thread that reads from Redis.
    """
    max_bytes = _MOST_GROWTH * max_request_bytes + _HEADERS_BYTES

    def read(queue: str, item: bytes) -> dict[str, Any] | None:
        try:
            payload = checked(item, queue, max_bytes)
            if not payload["headers"] and b'"task":' in item and task_id_in(item):
                # Those of protocol 1 have none, and both in their body, where quotes are escaped.
                raise RequestError("The task and its id must be in headers.", param="headers")
            return payload
        except RequestError as error:
            refuse(task_id_in(item), error)
            return None

    return read


def checked(item: bytes, queue: str, max_bytes: int) -> dict[str, Any]:
    """A message of this queue, as kombu can stand it.

    Raises `RequestError` for the first thing in it that makes this impossible.
    """
    if len(item) > max_bytes:
        raise RequestTooLarge(f"The message is larger than {max_bytes} bytes.")
    try:
        envelope = json.loads(item.decode(), object_hook=object_hook)
    except Exception:  # kombu's hook makes types of some objects, each with errors of its own
        raise RequestError("The message is not JSON in UTF-8.") from None
    if not isinstance(envelope, dict):
        raise RequestError("The message is not a JSON object.")
    properties = _properties(envelope.get("properties"), queue)
    headers = _headers(envelope.get("headers"))
    _check_body(envelope.get("body"), properties.get("body_encoding"))
    return envelope | {"properties": properties, "headers": headers}


def _properties(given: Any, queue: str) -> dict[str, Any]:
    """The properties with what kombu needs to take the message, to give it back and to ack it."""
    if not isinstance(given, dict | None):
        raise RequestError("properties must be an object.", param="properties")
    given = {} if given is None else given
    right = _missing(given, queue)
    return {**given, **right} if right else given


def _missing(properties: dict[str, Any], queue: str) -> dict[str, Any]:
    """What is to be put right in the properties."""
    right: dict[str, Any] = {}
    match properties.get("delivery_tag"):
        case str(tag) if tag and is_unicode(tag):
            pass
        case _:
            right["delivery_tag"] = str(uuid4())
    match properties.get("delivery_info"):
        case {"exchange": str(exchange), "routing_key": str(route)} if is_unicode(exchange + route):
            pass
        case _:
            right["delivery_info"] = {"exchange": "", "routing_key": queue}
    match properties.get("priority"):
        case None | bool() | int() | str():
            pass
        case float(number) if math.isfinite(number):
            pass
        case _:
            right["priority"] = 0
    return right


def _headers(given: Any) -> dict[str, Any]:
    if not isinstance(given, dict | None):
        raise RequestError("headers must be an object.", param="headers")
    if given and given.get("compression"):
        raise RequestError("Compressed bodies are not taken.", param="headers.compression")
    return {} if given is None else given


def _check_body(body: Any, encoding: Any) -> None:
    """In base64, or else as it is, as kombu has it."""
    if encoding not in (*_PLAIN, "base64"):
        raise RequestError(
            'properties.body_encoding must be "base64".', param="properties.body_encoding"
        )
    try:
        if not isinstance(body, str):
            raise TypeError
        if encoding not in _PLAIN:
            base64.b64decode(body)
    except (TypeError, ValueError):
        raise RequestError("body must be a string of base64.", param="body") from None


def task_id_in(item: bytes) -> str | None:
    """The task id in the headers, found without parsing: the item may be huge, or not JSON."""
    found = _TASK_ID.search(item)
    return found[1].decode() if found else None
