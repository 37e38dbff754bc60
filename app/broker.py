"""The broker: the Celery app, its queues, the messages in them, and every key in Redis.

The row in Postgres is the truth; a message is a wake-up that may be lost, doubled or late.

Queues. `gristmill.<model>` for each configured model, and `broker.default_queue` ("celery") for
messages that name no queue. All hang on the anonymous exchange, whose routing key is the queue's
name: there are no bindings that FLUSHALL could lose.

Keys, in the one database the URL names; kombu owns the layout:

    <queue>                            list: waiting messages of priority 0 to 2; LPUSH, BRPOP
    <queue>\\x06\\x163  \\x06\\x166  \\x06\\x169   lists: priorities 3 to 5, 6 to 8, and 9
    unacked                            hash: delivery tag → [message, exchange, routing key] as JSON
    unacked_index                      sorted set: delivery tag by the second it was taken
    unacked_mutex                      lock of the worker that puts overdue messages back
    <uuid>.reply.celery.pidbox         list: answers to one `celery inspect` or `control`
    _kombu.binding.<exchange>          set: bindings of celery.pidbox, reply.celery.pidbox, celeryev
    _kombu.binding_permanent.<exchange>, _kombu.binding_deadlines     their upkeep
    /<db>.celery.pidbox, /<db>.celeryev/…     channels: remote control, events for Flower

Message. Celery protocol 2 as JSON, one element of the list:

    body              base64 of the UTF-8 JSON [[], {request}, {}]: no positional arguments, the
                      request body (and `url`, if it does not follow from the fields) as keyword
                      arguments, nothing embedded. {} as request: it is in the row, under the id
    content-type      "application/json"
    content-encoding  "utf-8"
    headers           {"lang": any text, "task": "inference.generate" or "inference.embed",
                      "id": the job's UUID}; Celery's optional ones are honoured (eta, expires)
    properties        {"delivery_tag": a new UUID every time, "body_encoding": "base64",
                      "delivery_info": {"exchange": "", "routing_key": the queue},
                      "priority": 0 to 9}

`raw_message` builds the smallest message accepted, and `list_key` names the list it belongs to.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NoReturn
from uuid import UUID, uuid4

from celery import Celery, signals
from kombu.exceptions import KombuError
from kombu.transport import TRANSPORT_ALIASES
from redis.exceptions import RedisError

from app import telemetry
from app.config.settings import Settings
from app.errors import ConfigError, Unavailable
from app.jobs import Kind

TASK_NAMES: Final = {kind: f"inference.{kind}" for kind in Kind}
PRIORITY_STEPS: Final = (0, 3, 6, 9)
"""Kombu's own: a queue is one list per step, and a message goes to the last step not above it."""


def queue_name(model: str) -> str:
    return f"gristmill.{model}"


def priority_step(priority: int) -> int:
    """The place in `PRIORITY_STEPS` of the list for messages of this priority."""
    return bisect_right(PRIORITY_STEPS, priority) - 1


def list_key(queue: str, priority: int = 0) -> str:
    """The Redis list that holds a queue's messages of this priority."""
    step = PRIORITY_STEPS[priority_step(priority)]
    return f"{queue}\x06\x16{step}" if step else queue


def served_models(settings: Settings) -> tuple[str, ...]:
    """The models that a worker with these settings takes messages for."""
    return settings.worker.models or tuple(settings.models)


# ── the Celery app ──────────────────────────────────────────────────────────────────────────────


_TRANSPORTS: Final = {
    "redis": "app.worker.pool.transport:Transport",
    "rediss": "app.worker.pool.transport:Transport",
    "sentinel": "app.worker.pool.transport:SentinelTransport",
}
"""By the scheme of a URL. Celery's own setting of a transport is forgotten at a failover."""


def make_app(settings: Settings) -> Celery:
    """The Celery app of producers, worker and Flower. Opens no connection."""
    TRANSPORT_ALIASES.update(_TRANSPORTS)
    app = Celery("gristmill", set_as_current=False)
    app.settings = settings
    app.conf.update(_celery_settings(settings))
    for name in TASK_NAMES.values():
        app.task(_never_run, name=name, lazy=False)
    app.amqp.queues.select(
        [*map(queue_name, served_models(settings)), settings.broker.default_queue]
    )
    signals.setup_logging.connect(_setup_logging, weak=False)
    return app


def _celery_settings(settings: Settings) -> dict[str, Any]:
    broker = settings.broker
    names = [*map(queue_name, settings.models), broker.default_queue]
    sizes = [settings.models[model].max_batch_size for model in served_models(settings)]
    return {
        "broker_url": broker.url,
        # kombu would take any certificate; ssl_cert_reqs in the URL says otherwise.
        "broker_use_ssl": {"ssl_cert_reqs": "required"}
        if broker.url.startswith("rediss")
        else None,
        "worker_pool": "app.worker.pool.pool:EnginePool",
        "worker_consumer": "app.worker.pool.arrivals:Consumer",
        # Messages held: one batch running and one forming for each model; not threads.
        "worker_concurrency": 2 * sum(sizes),
        "worker_prefetch_multiplier": 1,
        # Acknowledged after the commit. A failure is a row, and a retry is the database's decision.
        "task_acks_late": True,
        "task_acks_on_failure": True,
        "task_acks_on_timeout": True,
        "task_ignore_result": True,
        "task_serializer": "json",
        "accept_content": ["json"],
        "task_queues": {name: {"exchange": "", "routing_key": name} for name in names},
        "task_default_queue": broker.default_queue,
        "task_default_exchange": "",
        "task_create_missing_queues": False,
        "broker_transport_options": {
            "visibility_timeout": broker.visibility_timeout_s,
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 6,
            "socket_timeout": broker.socket_timeout_s,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 25,
            "queue_order_strategy": "priority",
        },
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        # A lost connection does not stop the engine: the claim drops the message's second copy.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_send_task_events": True,
        "task_send_sent_event": False,
        "worker_disable_rate_limits": True,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "worker_enable_remote_control": True,
    }


def _never_run(*_: object, **__: object) -> NoReturn:
    raise RuntimeError("Gristmill's tasks run in batches: start the worker with its own pool.")


def _setup_logging(loglevel: int | str | None = None, **_: object) -> None:
    telemetry.setup_logging(loglevel or "INFO")


def worker_command(settings: Settings) -> tuple[list[str], dict[str, str]]:
    """Command line of a worker, and the environment variables to add to it.

    Without gossip and mingle, which only workers that share clocks need. SIGTERM is Celery's warm
    shutdown; the pool ends it within `worker.grace_s`, and sooner when nothing runs any more.
    """
    name = f"gristmill-{uuid4().hex[:8]}@%h"
    options = ["--without-gossip", "--without-mingle", "--hostname", name]
    return [*_CELERY, "worker", *options, "--loglevel", settings.log_level], {}


def flower_command(settings: Settings) -> tuple[list[str], dict[str, str]]:
    """Command line of Flower, and the environment variables to add to it.

    Read-only and in memory. Open on the loopback address alone; elsewhere FLOWER_BASIC_AUTH or
    FLOWER_AUTH must be set, or this raises `ConfigError`. `/metrics` and `/healthcheck` answer
    without a password in any case: keep the port private.
    """
    flower = settings.flower
    options = {
        "address": flower.host,
        "port": flower.port,
        "max_tasks": flower.max_tasks,
        "read_only": True,
        "tasks_columns": "uuid,name,state,kwargs,result,received,runtime",
        "persistent": False,
        "purge_offline_workers": 3600,  # a worker has another name after each start
    }
    command = [*_CELERY, "flower", *(f"--{name}={value}" for name, value in options.items())]
    if flower.host in ("127.0.0.1", "::1", "localhost"):
        return command, {"FLOWER_UNAUTHENTICATED_API": "true"}
    if not (os.environ.get("FLOWER_BASIC_AUTH") or os.environ.get("FLOWER_AUTH")):
        raise ConfigError(
            f"flower.host is {flower.host}: set FLOWER_BASIC_AUTH=user:password, or use 127.0.0.1."
        )
    return command, {}


READINESS: Final = "gristmill_readiness"
"""Name of the remote control command that asks a worker whether it makes progress."""


def ready_workers(settings: Settings, timeout_s: float = 1.0) -> list[str]:
    """Names, NAME@HOST, of the workers that answer within the time that they make progress.

    Raises `Unavailable`.
    """
    with _redis_errors(), make_app(settings) as app:
        replies = app.control.broadcast(READINESS, reply=True, timeout=timeout_s)
        return [
            name
            for reply in replies
            for name, answer in reply.items()
            if isinstance(answer, dict) and answer.get("ready")
        ]


_CELERY: Final = (sys.executable, "-m", "celery", "-A", "app.worker")


# ── messages ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Message:
    """A wake-up for one job. `request` is the body as it was sent, or None: it is in the row."""

    job_id: UUID
    kind: Kind
    model: str
    request: dict[str, Any] | None = None
    url: str | None = None
    priority: int = 0


def raw_message(
    job_id: UUID | str, kind: Kind, request: dict[str, Any], *, queue: str, priority: int = 0
) -> bytes:
    """The smallest message that is accepted: LPUSH it to `list_key(queue, priority)`."""
    body = json.dumps([[], request, {}]).encode()
    envelope = {
        "body": base64.b64encode(body).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "any", "task": TASK_NAMES[kind], "id": str(job_id)},
        "properties": {
            "delivery_tag": str(uuid4()),
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": priority,
        },
    }
    return json.dumps(envelope).encode()


class Publisher:
    """Sends messages. Threads may share it; it connects when first used, and again after a fault.

    Raises `Unavailable` when Redis refuses or does not answer within `broker.publish_timeout_s`.
    What was sent of a group is then unknown, so the whole group is to be sent again later: a
    second wake-up does no harm.
    """

    def __init__(self, settings: Settings) -> None:
        self._inline_requests = settings.broker.inline_requests
        timeout_s = settings.broker.publish_timeout_s
        self._app = make_app(settings)
        self._app.conf.broker_pool_acquire_timeout = timeout_s
        self._app.conf.broker_transport_options |= {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "max_retries": 0,
        }

    def send(self, message: Message) -> None:
        self.send_many([message])

    def send_many(self, messages: Iterable[Message]) -> None:
        """Send in order, a few hundred to a round trip."""
        with _redis_errors(), self._app.producer_or_acquire() as producer, producer.batch():
            for message in messages:
                self._app.send_task(
                    TASK_NAMES[message.kind],
                    kwargs=self._kwargs(message),
                    task_id=str(message.job_id),
                    queue=self._queue(message.model),
                    priority=message.priority,
                    # Without these Celery would print the prompt into two headers.
                    argsrepr="()",
                    kwargsrepr=f"(model={message.model})",
                    retry=False,
                    producer=producer,
                )

    def _queue(self, model: str) -> str:
        """The model's queue, also of one that only other processes' settings know."""
        name = queue_name(model)
        if name not in self._app.amqp.queues:
            self._app.amqp.queues.add(name, exchange="", routing_key=name)
        return name

    def _kwargs(self, message: Message) -> dict[str, Any]:
        if message.request is None or not self._inline_requests:
            return {}
        return message.request | ({"url": message.url} if message.url else {})

    def queue_lengths(self, models: Collection[str]) -> dict[str, int]:
        """Messages waiting in each model's queue, over all priorities. One round trip."""
        return {model: sum(lengths) for model, lengths in self.list_lengths(models).items()}

    def list_lengths(self, models: Collection[str]) -> dict[str, list[int]]:
        """Messages waiting in each model's queue, by `PRIORITY_STEPS`. One round trip."""
        return dict(zip(models, self._lengths(map(queue_name, models)), strict=True))

    def backlog(self, queues: Iterable[str]) -> int:
        """Messages in these queues, by name."""
        return sum(map(sum, self._lengths(queues)))

    def _lengths(self, queues: Iterable[str]) -> list[list[int]]:
        with _redis_errors(), self._app.pool.acquire(block=True) as connection:
            pipe = connection.default_channel.client.pipeline(transaction=False)
            for queue in queues:
                for step in PRIORITY_STEPS:
                    pipe.llen(list_key(queue, step))
            lengths = pipe.execute()
        steps = len(PRIORITY_STEPS)
        return [lengths[at : at + steps] for at in range(0, len(lengths), steps)]

    def close(self) -> None:
        self._app.close()


@contextmanager
def _redis_errors() -> Iterator[None]:
    """Turn what redis-py and kombu raise when the server is away into `Unavailable`."""
    try:
        yield
    except (KombuError, RedisError, OSError) as error:
        raise Unavailable(f"Redis does not answer ({type(error).__name__}).") from error
