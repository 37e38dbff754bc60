"""Sends messages and counts those that wait."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol, TypeVar
from uuid import UUID

import redis

from app.broker import cancels, lanes
from app.broker.app import make_app
from app.broker.lanes import Length, own_list
from app.broker.message import (
    FORMAT_HEADER,
    JOBS_HEADER,
    MORE_HEADER,
    TASK_NAMES,
    TENANT_HEADER,
    Message,
)
from app.broker.queues import NO_LIST, Layout, queue_name, queues_of
from app.broker.refusal import as_unavailable
from app.broker.streams import Streams
from app.broker.unread import unread
from app.broker.waiting import without_message
from app.config.settings import Settings
from app.jobs import DEFAULT_TENANT, Kind, digits_of
from app.requests.bodies import FORMAT

MAX_BUNDLE: Final = 100
"""Most jobs of one message, which never has more than its model's engine runs at once: it goes to
one worker."""
BUNDLE_OF_OTHERS: Final = 16
"""The same for models that only other processes' settings know."""

LOOK_EVERY_S: Final = 60.0
"""Pause between two looks for messages that nobody reads: each goes through many keys."""


class Sent(Protocol):
    """A job that has or gets a message."""

    @property
    def kind(self) -> Kind: ...
    @property
    def model(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def tenant(self) -> str: ...


J = TypeVar("J", bound=Sent)


def bundled(jobs: Iterable[J], size_of: Callable[[str], int]) -> Iterator[list[J]]:
    """Those that share a message: of one tenant, kind, model and priority, in order, at most
    `size_of` the model."""
    alike: dict[tuple[str, Kind, str, int], list[J]] = {}
    for job in jobs:
        alike.setdefault((job.tenant, job.kind, job.model, job.priority), []).append(job)
    for (_, _, model, _), group in alike.items():
        size = size_of(model)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def carried(group: Sequence[Message], most_bytes: int) -> dict[str, Any]:
    """What the message of these jobs holds of their requests: a small one of a job alone. So Redis
    stays small; all others a worker reads in the rows."""
    first, *more = group
    if more or first.request is None:
        return {}
    if len(json.dumps(first.request)) > most_bytes:  # in ASCII, as Celery writes it
        return {}
    return first.request | ({"url": first.url} if first.url else {})


class Publisher:
    """Sends messages. Threads may share it; it connects when first used, and again after a fault.

    Raises `Unavailable` when Redis refuses or does not answer within `broker.publish_timeout_s`.
    What was sent of a group is then unknown, so the whole group is to be sent again later: a
    second wake-up does no harm.
    """

    def __init__(self, settings: Settings) -> None:
        self.layout = Layout.of(settings)
        self._unread: dict[str, int] = {}
        self._look_again_at = 0.0
        self._default_queue = settings.broker.default_queue
        self._max_inline_bytes = settings.broker.max_inline_bytes
        self._bundle_sizes = {
            name: min(model.max_batch_size, MAX_BUNDLE) for name, model in settings.models.items()
        }
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
        """Send those of each model and priority in order, a few hundred to a round trip.

        Where there are several, one message wakes many jobs, and their requests are in their rows.
        """
        with (
            as_unavailable(),
            self._app.producer_or_acquire() as producer,
            _left_on_error(producer.connection),
            producer.batch(),
        ):
            for group in bundled(messages, self.bundle_size):
                self._send(group, producer)

    def bundle_size(self, model: str) -> int:
        """Most jobs of one message."""
        return self._bundle_sizes.get(model, BUNDLE_OF_OTHERS)

    def _send(self, group: Sequence[Message], producer: Any) -> None:
        first, *more = group
        headers: dict[str, Any] = {FORMAT_HEADER: FORMAT}
        if more:
            headers |= {MORE_HEADER: [str(each.job_id) for each in more], JOBS_HEADER: len(group)}
        if tenant := own_list(first.tenant, first.priority):
            headers[TENANT_HEADER] = tenant
        self._app.send_task(
            TASK_NAMES[first.kind],
            kwargs=carried(group, self._max_inline_bytes),
            task_id=str(first.job_id),
            queue=self._queue(first.model),
            priority=first.priority,
            headers=headers,
            # Without these Celery would print the prompt into two headers.
            argsrepr="()",
            kwargsrepr=f"(model={first.model})",
            retry=False,
            producer=producer,
        )

    def _queue(self, model: str) -> str:
        """The model's queue, also of one that only other processes' settings know."""
        name = queue_name(model)
        if name not in self._app.amqp.queues:
            self._app.amqp.queues.add(name, exchange="", routing_key=name)
        return name

    def queue_lengths(self, models: Collection[str]) -> dict[str, int]:
        """Messages waiting in each model's queue, over all priorities. One round trip."""
        return {
            model: sum(each.all for each in lengths)
            for model, lengths in zip(models, self._lengths(map(queue_name, models)), strict=True)
        }

    def list_lengths(
        self, models: Collection[str], tenant: str = DEFAULT_TENANT
    ) -> dict[str, list[Length]]:
        """What waits in each model's queue, by the steps of `layout`. One round trip."""
        found = self._lengths(map(queue_name, models), tenant)
        return {model: steps for model, (_, *steps) in zip(models, found, strict=True)}

    def backlog(self, queues: Iterable[str]) -> int:
        """Messages in these queues, by name."""
        return sum(each.all for lengths in self._lengths(queues) for each in lengths)

    def _lengths(self, queues: Iterable[str], tenant: str = DEFAULT_TENANT) -> list[list[Length]]:
        """Of each queue's lanes, in their order."""
        ends = self.layout.ends
        lists = [self.layout.prefix + queue + end for queue in queues for end in ends]
        with self._client() as client:
            found = lanes.lengths(client, lists, self.layout.sep, own_list(tenant))
        return [found[at : at + len(ends)] for at in range(0, len(found), len(ends))]

    def ring(self, models: Iterable[str]) -> None:
        """Wake workers for messages of tenants, where the last to be woken may have died of it."""
        queues = [self.layout.prefix + queue for queue in queues_of(models)]
        with self._client() as client:
            lanes.ring(client, queues, self.layout.ends, self.layout.sep)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Have tenants served by these weights from now on; all others have 1."""
        key = self.layout.prefix + lanes.WEIGHTS
        given: dict[Any, Any] = dict(weights)
        if DEFAULT_TENANT in given:
            given[own_list(DEFAULT_TENANT)] = given[DEFAULT_TENANT]
        with self._client() as client:
            pipe = client.pipeline()
            pipe.delete(key)
            if given:
                pipe.hset(key, mapping=given)
            pipe.execute()

    @contextmanager
    def _client(self) -> Iterator[redis.Redis]:
        """A plain client: its keys are whole."""
        with (
            as_unavailable(),
            self._app.pool.acquire(block=True) as connection,
            _left_on_error(connection),
        ):
            yield connection.default_channel.plain

    def unread(self) -> dict[str, int]:
        """Messages in lists that nobody here reads, by list; as of a minute ago at most."""
        now = time.monotonic()
        if now >= self._look_again_at:
            with as_unavailable(), self._app.pool.acquire(block=True) as connection:
                self._unread = unread(self._app.settings, connection.default_channel.plain)
            self._look_again_at = now + LOOK_EVERY_S
        return self._unread

    def without_message(self, models: Mapping[UUID, str]) -> set[UUID]:
        """Those of these jobs, each with its model, that have no message: in the model's queue,
        those of formats of before among them, or the default one."""
        by_model: defaultdict[str, set[UUID]] = defaultdict(set)
        for job_id, model in models.items():
            by_model[model].add(job_id)
        queues = {queue: ids for model, ids in by_model.items() for queue in queues_of([model])} | {
            self._default_queue: models.keys()
        }
        lists = {queue + end: ids for queue, ids in queues.items() for end in self.layout.ends}
        with (
            as_unavailable(),
            self._app.pool.acquire(block=True) as connection,
            _left_on_error(connection),
        ):
            client = connection.default_channel.client
            own = {
                key: ids
                for name, ids in lists.items()
                for key in lanes.tenants(client, name, self.layout.sep)
            }
            return without_message(client, lists | own)

    def tell_cancelled(self, worker_id: UUID, job_ids: Iterable[UUID]) -> None:
        """Tell a worker that jobs which it runs were cancelled. Raises `Unavailable`."""
        with (
            as_unavailable(),
            self._app.pool.acquire(block=True) as connection,
            _left_on_error(connection),
        ):
            client = connection.default_channel.client
            client.publish(cancels.channel_of(worker_id), digits_of(job_ids))

    def hear_cancels(
        self, worker_id: UUID, stop: threading.Event
    ) -> Iterator[frozenset[UUID] | None]:
        """What that worker is told, see `cancels.hear`."""
        return cancels.hear(self._app, worker_id, self.layout.prefix, stop)

    def try_to_send(self) -> None:
        """Do what a message does to Redis, to no list that there is. Raises `Unavailable`."""
        with (
            as_unavailable(),
            self._app.pool.acquire(block=True) as connection,
            _left_on_error(connection),
        ):
            connection.default_channel.client.lpushx(self.layout.prefix + NO_LIST, "")

    def streams(self) -> Streams:
        """Of jobs that have one; over this publisher's connections."""
        return Streams(self._app, self.layout.prefix)

    def close(self) -> None:
        self._app.close()


@contextmanager
def _left_on_error(connection: Any) -> Iterator[None]:
    """Connect anew next time: a server that was demoted keeps its clients, and refuses them."""
    try:
        yield
    except Exception:
        connection.collect()
        raise
