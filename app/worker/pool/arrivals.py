"""From a Celery message to an arrival, or a refusal that says why.

Everything that can be wrong with a message is found here, on the hub thread, before Celery makes a
Request of it: an exception there would end in a log line with the prompt in it, or end the worker.
A good message goes on with an empty body and clean headers, so that nothing in Celery (events,
`inspect active`, DEBUG logs, Flower) can show a prompt.

Celery would hold a message with `eta` in memory and drop an expired one without a trace. Here they
become the row's `not_before` and `deadline`, and the store keeps them.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from kombu.message import Message
from kombu.serialization import loads

from app.config.settings import Settings
from app.errors import GristmillError, RequestError, RequestTooLarge
from app.jobs import MAX_PRIORITY, Kind, job_id_of
from app.requests import bodies
from app.requests.bodies import Request

TASKS: Final = {"inference.generate": Kind.GENERATE, "inference.embed": Kind.EMBED}
ARRIVAL_HEADER: Final = "gristmill"
EMPTY_BODY: Final = "[[], {}, {}]"
EMBEDS: Final = ("callbacks", "errbacks", "chain", "chord")
MAX_TASK_ID: Final = 255


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message that may become a job. Without a request it only wakes a row."""

    job_id: UUID
    request: Request | None
    model: str | None  #: None when the request is in the row
    priority: int
    not_before: dt.datetime | None
    deadline: dt.datetime | None
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A message that cannot run. `acknowledge` is to be called once the reason is recorded."""

    job_id: UUID
    kind: Kind
    error: GristmillError
    acknowledge: Callable[[], object]


def identify(message: Message, settings: Settings) -> tuple[str, str]:
    """Task id and task name, from the headers or, in protocol 1, the body.

    Raises `RequestError` if the message cannot be tied to a job at all.
    """
    source: Any = message.headers
    if not (isinstance(source, dict) and "task" in source):
        if len(message.body or b"") > settings.worker.max_request_bytes:
            raise RequestError("it is too large and its headers hold no task id.")
        source = _decode(message)
    if not isinstance(source, dict):
        raise RequestError("it is not a Celery message.")
    task_id, name = source.get("id"), source.get("task")
    if not (isinstance(task_id, str) and 0 < len(task_id) <= MAX_TASK_ID):
        raise RequestError("it has no usable task id.")
    return task_id, name if isinstance(name, str) else ""


def read(message: Message, task_id: str, name: str, settings: Settings) -> Arrival:
    """Check everything that needs no tokenizer.

    Raises `RequestError` with the first thing that is wrong; never an exception of another kind.
    """
    if name not in TASKS:
        known = " and ".join(TASKS)
        raise RequestError(f"Unknown task name; this worker knows {known}.", param="task")
    if len(message.body or b"") > settings.worker.max_request_bytes:
        raise RequestTooLarge(
            f"The message body is larger than {settings.worker.max_request_bytes} bytes."
        )
    args, kwargs, embed = _payload(_decode(message))
    if args:
        raise RequestError("Positional arguments are not taken; use keywords.", param="args")
    if embed and not (isinstance(embed, dict) and not any(embed.get(key) for key in EMBEDS)):
        raise RequestError("Callbacks, chains and chords are not taken.", param="embed")
    headers = message.headers if "task" in message.headers else kwargs
    timing = _Timing.of(headers if headers is message.headers else {})
    priority = _priority(message)
    if not kwargs:
        return Arrival(job_id_of(task_id), None, None, priority, timing.eta, timing.expires, {})
    request, metadata = _request(kwargs, TASKS[name])
    model = settings.model_name(request.kind, request.body.model)
    return Arrival(
        job_id_of(task_id), request, model, priority, timing.eta, timing.expires, metadata
    )


def _decode(message: Message) -> Any:
    """The body as plain values. Only JSON: a pickle would be code."""
    for error in message.errors or ():
        raise RequestError("The message body cannot be unpacked.", param="body") from error[1]
    try:
        return loads(  # type: ignore[no-untyped-call]
            message.body,
            message.content_type,
            message.content_encoding,
            accept={"application/json"},
        )
    except Exception:
        raise RequestError(
            "The message body must be JSON, with content type application/json.", param="body"
        ) from None


def _payload(decoded: Any) -> tuple[Any, dict[str, Any], Any]:
    """Arguments of a protocol 2 body, `[args, kwargs, embed]`, or of a protocol 1 mapping."""
    match decoded:
        case [list() as args, dict() as kwargs, embed]:
            return args, kwargs, embed
        case {"args": list() as args, "kwargs": dict() as kwargs, **rest}:
            return args, kwargs, rest
        case _:
            raise RequestError("The message body must be [args, kwargs, embed].", param="body")


def _request(kwargs: dict[str, Any], kind: Kind) -> tuple[Request, dict[str, str]]:
    body = dict(kwargs)
    url = body.pop("url", None)
    if url is not None and not isinstance(url, str):
        raise RequestError("url must be a string.", param="url")
    metadata = bodies.parse_metadata(body.pop("metadata", None))
    request = bodies.parse(body, url)
    if request.kind is not kind:
        wanted = next(name for name, of in TASKS.items() if of is request.kind)
        raise RequestError(f"This request belongs to the task {wanted}.", param="task")
    return request, metadata


def _priority(message: Message) -> int:
    given = (message.properties or {}).get("priority")
    return min(max(given, 0), MAX_PRIORITY) if isinstance(given, int) else 0


@dataclass(frozen=True, slots=True)
class _Timing:
    eta: dt.datetime | None
    expires: dt.datetime | None

    @classmethod
    def of(cls, headers: dict[str, Any]) -> _Timing:
        limits = headers.get("timelimit")
        if limits is not None and not (
            isinstance(limits, list)
            and len(limits) == 2
            and all(limit is None or isinstance(limit, int | float) for limit in limits)
        ):
            raise RequestError("timelimit must be two numbers of seconds.", param="timelimit")
        return cls(_stamp(headers, "eta"), _stamp(headers, "expires"))


def _stamp(headers: dict[str, Any], field: str) -> dt.datetime | None:
    """An ISO 8601 time; without a zone it is UTC, as Celery sends it."""
    given = headers.get(field)
    if given is None:
        return None
    try:
        stamp = dt.datetime.fromisoformat(given)
    except (TypeError, ValueError):
        raise RequestError(f"{field} must be an ISO 8601 time.", param=field) from None
    return stamp if stamp.tzinfo else stamp.replace(tzinfo=dt.UTC)


def scrub(message: Message, task_id: str, name: str, arrival: Arrival) -> None:
    """Leave in the message only what Celery needs, and the arrival for the pool."""
    given = message.headers if isinstance(message.headers, dict) else {}
    message.headers = {
        "lang": "py",
        "task": name,
        "id": task_id,
        "root_id": task_id,
        "parent_id": None,
        "retries": 0,
        "timelimit": given.get("timelimit") or [None, None],
        "argsrepr": "()",
        "kwargsrepr": f"(model={arrival.model})" if arrival.model else "()",
        "ignore_result": True,
        ARRIVAL_HEADER: arrival,
    }
    message.body = EMPTY_BODY
    message.content_type, message.content_encoding = "application/json", "utf-8"
