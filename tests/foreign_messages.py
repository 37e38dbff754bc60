"""What Celery clients in other languages push into Redis, as their sources build it.

Each was read at the commit named beside it; ids, times and arguments are ours. Their own quirks are
kept: protocol 1, an exchange of their own, plain bodies, null for what is empty.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import uuid4

ETA: Final = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
EXPIRES: Final = datetime(2030, 1, 2, 4, 4, 5, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Foreign:
    """One recorded way to send."""

    build: Callable[[str, dict[str, Any]], dict[str, Any]]  #: of task id and request
    has_times: bool = False  #: it says `ETA` and `EXPIRES`
    time_limit_s: float | None = None


def item(recorded: Foreign, task_id: str, request: dict[str, Any]) -> bytes:
    """The list item, as it is pushed."""
    return json.dumps(recorded.build(task_id, request)).encode()


def _base64(body: object) -> str:
    return base64.b64encode(json.dumps(body).encode()).decode()


def _gocelery(task_id: str, request: dict[str, Any], **times: str) -> dict[str, Any]:
    """gocelery/gocelery 825d890, message.go: protocol 1, no headers, its own exchange, priority in
    the delivery info; `expires` is a Go time in RFC 3339 with nanoseconds."""
    body = {
        "id": task_id,
        "task": "inference.generate",
        "args": [],
        "kwargs": request,
        "retries": 0,
        "eta": None,
        "expires": None,
        **times,
    }
    return {
        "body": _base64(body),
        "content-type": "application/json",
        "properties": {
            "body_encoding": "base64",
            "correlation_id": str(uuid4()),
            "reply_to": str(uuid4()),
            "delivery_info": {"priority": 0, "routing_key": "celery", "exchange": "celery"},
            "delivery_mode": 2,
            "delivery_tag": str(uuid4()),
        },
        "content-encoding": "utf-8",
    }


def _celery_node(body: object, headers: dict[str, Any], task_id: str) -> dict[str, Any]:
    """actumn/celery.node 5a1a412, src/kombu/brokers/redis.ts: properties in camel case."""
    return {
        "body": _base64(body),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": headers,
        "properties": {
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "celery"},
            "delivery_mode": 2,
            "delivery_tag": str(uuid4()),
            "correlationId": task_id,
            "replyTo": "",
        },
    }


def _celery_node_2(task_id: str, request: dict[str, Any], args: Any = ()) -> dict[str, Any]:
    """src/app/client.ts, asTaskV2: three headers, an empty embed; null where args were left out."""
    headers = {"lang": "js", "task": "inference.generate", "id": task_id}
    return _celery_node([args, request, {}], headers, task_id)


def _celery_node_1(task_id: str, request: dict[str, Any]) -> dict[str, Any]:
    """src/app/client.ts, asTaskV1, the default: no args if none were given, no other option."""
    body = {"task": "inference.generate", "id": task_id, "kwargs": request}
    return _celery_node(body, {}, task_id)


def _node_celery(task_id: str, request: dict[str, Any], **options: Any) -> dict[str, Any]:
    """mher/node-celery 71d8dd6, celery.js and protocol.js: protocol 1, exchange named as the queue,
    JavaScript's times in milliseconds, a correlation id that JSON.stringify leaves out."""
    body = {
        "task": "inference.generate",
        "args": [],
        "kwargs": request,
        "id": task_id,
        **options,
    }
    return {
        "body": _base64(body),
        "headers": {},
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "properties": {
            "body_encoding": "base64",
            "delivery_info": {"exchange": "celery", "priority": 0, "routing_key": "celery"},
            "delivery_mode": 2,
            "delivery_tag": str(uuid4()),
            "reply_to": str(uuid4()),
        },
    }


def _rusty_celery(task_id: str, request: dict[str, Any], **headers: Any) -> dict[str, Any]:
    """rusty-celery 1a0168f, src/protocol/mod.rs, json_serialized: every header, null when unset,
    and an embed of nulls; all parameters of the task, null where it has none."""
    embed = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))
    unset = ("lang", "root_id", "parent_id", "group", "meth", "shadow", "eta", "expires")
    return {
        "body": _base64([[], request | {"temperature": None, "stop": None}, embed]),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "id": task_id,
            "task": "inference.generate",
            **dict.fromkeys(unset),
            "retries": None,
            "timelimit": [None, None],
            "argsrepr": None,
            "kwargsrepr": None,
            "origin": "gen7@mill",
            **headers,
        },
        "properties": {
            "correlation_id": task_id,
            "reply_to": None,
            "delivery_tag": str(uuid4()),
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "celery"},
        },
    }


def _celery_php(task_id: str, request: dict[str, Any], **headers: Any) -> dict[str, Any]:
    """gjedeer/celery-php 8ab6fe5, src/RedisConnector.php and CeleryAbstract.php: the body is JSON
    without base64, its encoding "binary", the tag is the task id, the embed null."""
    return {
        "content-type": "application/json",
        "content-encoding": "binary",
        "properties": {
            "reply_to": task_id,
            "delivery_info": {"priority": 0, "routing_key": "celery", "exchange": "celery"},
            "delivery_mode": 2,
            "delivery_tag": task_id,
        },
        "headers": {"lang": "py", "task": "inference.generate", "id": task_id, **headers},
        "body": json.dumps([[], request, None]),
    }


def _times(eta: str, expires: str) -> dict[str, str]:
    return {"eta": eta, "expires": expires}


_GO: Final = _times("2030-01-02T04:04:05+01:00", "2030-01-02T05:04:05.000000999+01:00")
_JS: Final = _times("2030-01-02T03:04:05.000Z", "2030-01-02T04:04:05.000Z")
_RUST: Final = _times("2030-01-02T03:04:05+00:00", "2030-01-02T04:04:05.000000000+00:00")
_PHP: Final = _times("2030-01-02T03:04:05", "2030-01-02T04:04:05")

FOREIGN: Final[Mapping[str, Foreign]] = {
    "gocelery": Foreign(_gocelery),
    "gocelery with times": Foreign(lambda *a: _gocelery(*a, **_GO), has_times=True),
    "celery.node, protocol 2": Foreign(lambda *a: _celery_node_2(*a, [])),
    "celery.node, protocol 2 without args": Foreign(lambda *a: _celery_node_2(*a, None)),
    "celery.node, protocol 1": Foreign(_celery_node_1),
    "node-celery": Foreign(_node_celery),
    "node-celery with times": Foreign(lambda *a: _node_celery(*a, **_JS), has_times=True),
    "node-celery with other options": Foreign(
        lambda *a: _node_celery(*a, retries=2, utc=True, queue="celery", timeouts=[3, 2])
    ),
    "rusty-celery": Foreign(_rusty_celery),
    "rusty-celery with times": Foreign(
        lambda *a: _rusty_celery(*a, **_RUST, timelimit=[60, 50]),
        has_times=True,
        time_limit_s=60.0,
    ),
    "celery-php": Foreign(_celery_php),
    "celery-php with times": Foreign(lambda *a: _celery_php(*a, **_PHP), has_times=True),
}
