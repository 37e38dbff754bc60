"""The check in front of kombu: a list item that it cannot parse would end the worker.

Whoever may write to Redis may push anything. Kombu takes an item off the list and parses it with no
net below: bytes that are not JSON, or a missing field, are an unrecoverable error of the whole
worker, and a compressed body is unpacked without a limit. `guard` looks at the raw bytes first and
answers "the queue was empty" in place of an item that kombu could not stand.

Such an item is already off its list and never among the unacknowledged: there is nothing to ack.
What is wrong inside a message that kombu can parse is found by `app.worker.pool.arrivals`.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from typing import Any, Final

from kombu.utils.json import object_hook

from app.errors import RequestError, RequestTooLarge

_TASK_ID: Final = re.compile(rb'"id"\s*:\s*"([^"\\\x00-\x1f\x80-\xff]{1,255})"')
_MOST_GROWTH: Final = 4
"""A request in UTF-8 grows up to 3 times as JSON with escapes, and by a third in base64."""
_HEADERS_BYTES: Final = 65_536


def guard(
    client: Any, max_request_bytes: int, refuse: Callable[[str | None, RequestError], object]
) -> None:
    """Check whatever this Redis client receives from a queue.

    `refuse(task_id, error)` gets what was held back, with the task id if one can be read, in the
    thread that reads from Redis.
    """
    max_bytes = _MOST_GROWTH * max_request_bytes + _HEADERS_BYTES

    def screen(reply: list[bytes] | None, **_: object) -> tuple[bytes, bytes] | None:
        if not reply:
            return None
        key, item = reply
        try:
            check(item, max_bytes)
        except RequestError as error:
            refuse(task_id_in(item), error)
            return None
        return key, item

    client.set_response_callback("BRPOP", screen)


def check(item: bytes, max_bytes: int) -> None:
    """Raise `RequestError` for the first thing in a message that kombu could not stand."""
    if len(item) > max_bytes:
        raise RequestTooLarge(f"The message is larger than {max_bytes} bytes.")
    try:
        envelope = json.loads(item.decode(), object_hook=object_hook)
    except Exception:  # kombu's hook makes types of some objects, each with errors of its own
        raise RequestError("The message is not JSON in UTF-8.") from None
    if not isinstance(envelope, dict):
        raise RequestError("The message is not a JSON object.")
    _check_properties(envelope.get("properties"))
    _check_headers(envelope.get("headers"))
    _check_body(envelope.get("body"))


def _check_properties(properties: Any) -> None:
    match properties:
        case {
            "delivery_tag": str(tag),
            "delivery_info": {"exchange": str(), "routing_key": str()},
            "body_encoding": "base64",
        } if tag:
            return
        case _:
            raise RequestError(
                "The message needs properties.delivery_tag (a new UUID), .delivery_info (exchange "
                'and routing_key) and .body_encoding ("base64").',
                param="properties",
            )


def _check_headers(headers: Any) -> None:
    if not isinstance(headers, dict | None):
        raise RequestError("headers must be an object.", param="headers")
    if headers and headers.get("compression"):
        raise RequestError("Compressed bodies are not taken.", param="headers.compression")


def _check_body(body: Any) -> None:
    try:
        base64.b64decode(body)
    except (TypeError, ValueError):
        raise RequestError("body must be a string of base64.", param="body") from None


def task_id_in(item: bytes) -> str | None:
    """The task id in the headers, found without parsing: the item may be huge, or not JSON."""
    found = _TASK_ID.search(item)
    return found[1].decode() if found else None
