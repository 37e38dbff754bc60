"""From a Celery message to an arrival, or a refusal that says why.

Everything that can be wrong with a message is found here, on the hub thread, before Celery makes a
Request of it: an exception there would end in a log line with the prompt in it, or end the worker.
A good message goes on as its arrival, and what is kept of it to be settled is empty, so that
nothing in Celery (events, `inspect active`, DEBUG logs, Flower) can show a prompt.

Celery would hold a message with `eta` in memory and drop an expired one without a trace. Here they
become the row's `not_before` and `deadline`, and the store keeps them.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeGuard
from uuid import UUID

from kombu.message import Message
from kombu.serialization import loads
from kombu.utils.encoding import str_to_bytes

from app.broker.message import (
    FORMAT_HEADER,
    MAX_MORE,
    MORE_HEADER,
    STREAM_HEADER,
    TASK_NAMES,
    TASKS,
    TENANT_HEADER,
)
from app.config.settings import BrokerSettings, Settings
from app.errors import GristmillError, RequestError, RequestTooLarge
from app.jobs import LIVE_PRIORITY, MAX_PRIORITY, Kind, bounded, job_id_of
from app.keys import is_tenant
from app.requests import bodies, json_text
from app.requests.bodies import URL_OF_INPUT, Request
from app.requests.storable import is_unicode
from app.store.tables import DEFAULT_TENANT

EMPTY_BODY: Final = "[[], {}, {}]"
EMBEDS: Final = ("callbacks", "errbacks", "chain", "chord")
MAX_TASK_ID: Final = 255
MAX_TIME_LIMIT_S: Final = 1e9


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message that may become a job. Without a request it only wakes a row."""

    job_id: UUID
    request: Request | None
    model: str | None  #: None when the request is in the row
    priority: int
    not_before: dt.datetime | None  #: in UTC and bounded, like the deadline
    deadline: dt.datetime | None
    metadata: dict[str, str]
    time_limit_s: float | None = None  #: positive and finite
    stream_events: bool = False  #: its tokens are told as they come
    more: tuple[str, ...] = ()  #: task ids of further jobs, whose rows are there
    tenant: str = DEFAULT_TENANT  #: of a job that it brings
    queue: str | None = None  #: that it came through

    def others(self) -> list[tuple[str, Arrival]]:
        """The further jobs by their task ids."""
        return [
            (
                task_id,
                Arrival(
                    job_id_of(task_id),
                    None,
                    None,
                    self.priority,
                    None,
                    None,
                    {},
                    tenant=self.tenant,
                    queue=self.queue,
                ),
            )
            for task_id in self.more
        ]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A message that cannot run. `acknowledge` is to be called once the reason is recorded."""

    job_id: UUID
    kind: Kind
    error: GristmillError
    acknowledge: Callable[[], object]
    tenant: str  #: whose job it would have been


def identify(message: Message, settings: Settings) -> tuple[str, str]:
    """Task id and task name, from the headers or, in protocol 1, the body.

    Raises `RequestError` if the message cannot be tied to a job at all.
    """
    source: Any = message.headers
    if not _is_protocol_2(message):
        if len(message.body or b"") > settings.worker.max_request_bytes:
            raise RequestError("it is too large and its headers hold no task id.")
        source = _decode(message)
    if not isinstance(source, dict):
        raise RequestError("it is not a Celery message.")
    task_id, name = source.get("id"), source.get("task")
    if isinstance(task_id, UUID):  # a client of Python that gave one and not its text
        task_id = str(task_id)
    if not _is_task_id(task_id):
        raise RequestError("it has no usable task id.")
    return task_id, name if isinstance(name, str) else ""


def read(message: Message, task_id: str, name: str, settings: Settings) -> Arrival:
    """Check everything that needs no tokenizer, and bring it into the range of what a row holds.

    Raises `RequestError` with the first thing that is wrong; never an exception of another kind.
    """
    if name not in TASKS:
        known = ", ".join(TASKS)
        raise RequestError(f"Unknown task name; this worker knows {known}.", param="task")
    if len(message.body or b"") > settings.worker.max_request_bytes:
        raise RequestTooLarge(
            f"The message body is larger than {settings.worker.max_request_bytes} bytes."
        )
    decoded = _decode(message)
    args, kwargs, embed = _payload(decoded)
    if args:
        raise RequestError("Positional arguments are not taken; use keywords.", param="args")
    if embed and not (isinstance(embed, dict) and not any(embed.get(key) for key in EMBEDS)):
        raise RequestError("Callbacks, chains and chords are not taken.", param="embed")
    options = message.headers if _is_protocol_2(message) else decoded
    request: Request | None = None
    if kwargs and _is_readable(options):
        request = _request(kwargs, TASKS[name], settings)
    return Arrival(
        job_id=job_id_of(task_id),
        request=request,
        model=settings.model_name(request.kind, request.body.model) if request else None,
        priority=_priority(message, 0 if request else LIVE_PRIORITY),
        not_before=_stamp(options, "eta"),
        deadline=_stamp(options, "expires"),
        metadata=request.body.metadata if request else {},
        time_limit_s=_time_limit(options),
        stream_events=_stream_events(options),
        more=_more(options),
        tenant=_tenant(options, settings.broker),
        queue=message.delivery_info.get("routing_key"),
    )


def tenant_of(message: Message, broker: BrokerSettings) -> str:
    """Whose job a message would bring that cannot be read. One of protocol 1 names nobody."""
    return _tenant(message.headers, broker) if _is_protocol_2(message) else broker.tenant


def _tenant(options: dict[str, Any], broker: BrokerSettings) -> str:
    """Whose job a message brings: what it says of that counts where it is trusted with it."""
    named, trusted = options.get(TENANT_HEADER), broker.trusted_tenants
    if isinstance(named, str) and is_tenant(named) and (named in trusted or "*" in trusted):
        return named
    return broker.tenant


def _is_protocol_2(message: Message) -> bool:
    return isinstance(message.headers, dict) and "task" in message.headers


def _is_readable(options: dict[str, Any]) -> bool:
    """Whether the request is of a format known here. One that is not is in its row as well: who
    sends it is of a later version of Gristmill, and writes the row first."""
    given = options.get(FORMAT_HEADER, bodies.FORMAT)
    return not isinstance(given, int) or bodies.readable(given)


def _decode(message: Message) -> Any:
    """The body as plain values. Only JSON: a pickle would be code."""
    for error in message.errors or ():
        raise RequestError("The message body cannot be unpacked.", param="body") from error[1]
    try:
        json_text.refuse_crowded(str_to_bytes(message.body))  # type: ignore[no-untyped-call]
        return loads(  # type: ignore[no-untyped-call]
            message.body,
            message.content_type,
            message.content_encoding,
            accept={"application/json"},
        )
    except RequestError:
        raise
    except Exception:
        raise RequestError(
            "The message body must be JSON, with content type application/json.", param="body"
        ) from None


def _payload(decoded: Any) -> tuple[list[Any], dict[str, Any], Any]:
    """Arguments of a protocol 2 body, `[args, kwargs, embed]`, or of a protocol 1 mapping.

    Clients leave out what is empty, or write null or the other kind of brackets.
    """
    match decoded:
        case [args, kwargs, embed]:
            pass
        case {"args": _} | {"kwargs": _}:
            args, kwargs, embed = decoded.get("args"), decoded.get("kwargs"), decoded
        case _:
            args, kwargs, embed = False, False, None
    args, kwargs = _or_empty(args, []), _or_empty(kwargs, {})
    if not (isinstance(args, list) and isinstance(kwargs, dict)):
        raise RequestError("The message body must be [args, kwargs, embed].", param="body")
    return args, kwargs, embed


def _or_empty(given: Any, empty: Any) -> Any:
    return empty if given is None or given in ([], {}) else given


def _request(kwargs: dict[str, Any], kind: Kind, settings: Settings) -> Request:
    body = dict(kwargs)
    url = body.pop("url", None)
    if url is not None and not isinstance(url, str):
        raise RequestError("url must be a string.", param="url")
    if url is None:  # its `input` would be one of embeddings
        url = URL_OF_INPUT.get(kind)
    request = bodies.parse(
        body, url, unknown_fields=settings.unknown_fields, kind_of=settings.kind_of
    )
    if request.kind is not kind:
        wanted = TASK_NAMES[request.kind]
        raise RequestError(f"This request belongs to the task {wanted}.", param="task")
    return request


def _priority(message: Message, least: int) -> int:
    """As kombu reads it, which chose the list by it."""
    try:
        given = int((message.properties or {}).get("priority", 0))
    except (TypeError, ValueError, OverflowError):
        return 0
    return min(max(given, least), MAX_PRIORITY)


def _stamp(options: dict[str, Any], field: str) -> dt.datetime | None:
    """An ISO 8601 time; without a zone it is UTC, as Celery sends it."""
    given = options.get(field)
    if given is None or given == "":
        return None
    try:
        stamp = dt.datetime.fromisoformat(given)
    except (TypeError, ValueError):
        raise RequestError(f"{field} must be an ISO 8601 time.", param=field) from None
    return bounded(stamp if stamp.tzinfo else stamp.replace(tzinfo=dt.UTC))


def _time_limit(options: dict[str, Any]) -> float | None:
    """Seconds that the job may run: the first of Celery's `[hard, soft]`. As there, 0 is none."""
    match options.get("timelimit"):
        case None | []:
            return None
        case [hard, soft] if _is_limit(hard) and _is_limit(soft):
            return float(min(hard, MAX_TIME_LIMIT_S)) if hard else None
        case _:
            raise RequestError(
                "timelimit must be two numbers of seconds, or null.", param="timelimit"
            )


def _stream_events(options: dict[str, Any]) -> bool:
    given = options.get(STREAM_HEADER)
    if given is not None and not isinstance(given, bool):
        raise RequestError("stream_events must be true or false.", param=STREAM_HEADER)
    return bool(given)


def _more(options: dict[str, Any]) -> tuple[str, ...]:
    more = options.get(MORE_HEADER)
    if more is None:
        return ()
    if not (isinstance(more, list) and len(more) <= MAX_MORE and all(map(_is_task_id, more))):
        raise RequestError(f"more must be a list of at most {MAX_MORE} task ids.", param="more")
    return tuple(more)


def _is_task_id(given: Any) -> TypeGuard[str]:
    return isinstance(given, str) and 0 < len(given) <= MAX_TASK_ID and is_unicode(given)


def _is_limit(given: Any) -> bool:
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    return given is None or (is_number and 0 <= given < math.inf)


def scrub(message: Message) -> None:
    """Leave in the message only what it takes to settle it."""
    message.headers, message.properties = {}, {}
    message.body, message._decoded_cache = EMPTY_BODY, ([], {}, {})
    message.content_type, message.content_encoding = "application/json", "utf-8"
