"""Kombu's Redis transport, made to outlive its connection and a server that refuses or is full.

Kombu knows a lost connection and takes an error reply for a fault of the program, which ends the
worker. But a server that was demoted, or may not save, or has changed a user's rights, heals as one
that was away does. So every error reply counts as a lost connection here: Celery closes its own,
connects anew and goes on from there.

When Redis goes away kombu closes the connection's channels one by one and stops at the first that
fails. The consumer's own channel may be left open, on a transport that has forgotten where its
server is: giving back the unacknowledged messages, or acknowledging one later, is then an
AttributeError, which Celery takes for the end of the worker.

A full Redis still gives messages away, but lets kombu note neither that they are unacknowledged nor
which queues there are, and refuses even to remove such a note in a transaction. Each of these would
end the worker, or keep it from starting: and a worker is what empties a full Redis.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final
from uuid import uuid4

from kombu.transport import redis, virtual
from kombu.utils.json import dumps
from kombu.utils.scheduling import round_robin_cycle
from redis.exceptions import RedisError, ResponseError

from app import telemetry
from app.broker.refusal import said

log = logging.getLogger(__name__)
telemetry.say_once(log)

FULL: Final = "command not allowed when used memory"
"""What Redis answers when it is full, by itself or through a script."""


class _UnlessFull:
    """Do what is inside; if the server is full, say what is done instead and go on."""

    def __init__(self, instead: str) -> None:
        self._instead = instead

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        is_full = isinstance(error, ResponseError) and FULL in str(error)
        if is_full:
            log.warning("Redis is full; %s.", self._instead, extra={"action": "redis_full"})
        return is_full


class QoS(redis.QoS):
    """The messages that were taken and not yet acknowledged, and how many of them by queue.

    A message counts for the queue that its sender wrote into it, or that `count` says it is of.

    What the server refused to note, full or for another reason, is in this worker's hands alone: if
    it is lost with the worker, rescue sends it again, as any that is missing.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]
        self.held: Counter[str] = Counter()
        self._queue_of: dict[str, str] = {}

    def append(self, message: Any, delivery_tag: str) -> None:
        self.count(delivery_tag, message.delivery_info.get("routing_key", ""))
        try:
            super().append(message, delivery_tag)  # type: ignore[no-untyped-call]
        except ResponseError as error:
            log.warning("%s A message is held here alone.", said(error))
            virtual.QoS.append(self, message, delivery_tag)  # type: ignore[no-untyped-call]

    def count(self, delivery_tag: str, queue: str) -> None:
        """Count a message for this queue and for no other."""
        self._let_go(delivery_tag)
        self._queue_of[delivery_tag] = queue
        self.held[queue] += 1

    def ack(self, delivery_tag: str) -> None:
        """Its place is free, also where the server refuses or is away: it keeps its note then, and
        delivers again what is done by that time."""
        try:
            super().ack(delivery_tag)  # type: ignore[no-untyped-call]
        except ResponseError as error:
            log.warning("%s Messages are done and not taken off.", said(error))
            virtual.QoS.ack(self, delivery_tag)  # type: ignore[no-untyped-call]
        except (RedisError, OSError):
            virtual.QoS.ack(self, delivery_tag)  # type: ignore[no-untyped-call]
            raise
        finally:
            self._let_go(delivery_tag)

    def move(self, delivery_tag: str, key: str, item: str) -> None:
        """Put an item into a list in place of a message that was taken, at once or not at all."""
        with self.pipe_or_acquire() as pipe:
            self._remove_from_indices(delivery_tag, pipe.lpush(key, item)).execute()
        virtual.QoS.ack(self, delivery_tag)  # type: ignore[no-untyped-call]
        self._let_go(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        super().reject(delivery_tag, requeue)  # type: ignore[no-untyped-call]
        self._let_go(delivery_tag)

    def _let_go(self, delivery_tag: str) -> None:
        if queue := self._queue_of.pop(delivery_tag, None):
            self.held[queue] -= 1

    def _remove_from_indices(self, delivery_tag: str, pipe: Any = None) -> Any:
        if pipe is not None:
            return super()._remove_from_indices(delivery_tag, pipe)  # type: ignore[no-untyped-call]
        with self.channel.conn_or_acquire() as client:
            plain = client.pipeline(transaction=False)  # a transaction would be refused
            return super()._remove_from_indices(delivery_tag, plain)  # type: ignore[no-untyped-call]

    def restore_visible(self, *args: Any, **options: Any) -> None:
        """A full server has no room for the lock that this takes."""
        with _UnlessFull("what dead workers held is left to rescue"):
            super().restore_visible(*args, **options)  # type: ignore[no-untyped-call]


class Turns(round_robin_cycle):
    """The order in which queues are asked: who was served last is asked last.

    Redis looks at every queue for urgent messages before it looks at any for patient ones, so this
    is the order within each step of priority. A queue that has its budget of held messages is left
    out until some are acknowledged, so that a long queue does not take the room of an idle one.
    """

    def __init__(self, channel: Any) -> None:
        super().__init__([])  # type: ignore[no-untyped-call]
        self._channel = channel

    def consume(self, n: int) -> list[str]:
        return [queue for queue in super().consume(n) if not self._channel._is_sated(queue)]  # type: ignore[no-untyped-call]

    @property
    def leaves_out(self) -> bool:
        return any(map(self._channel._is_sated, self.items))


SHARED: Final = "shared "
"""Before a queue's name in the count of its messages that came by others; no name has a space."""

LOOK_AGAIN_S: Final = 0.05
"""Longest wait for the other queues while one is left out: it may have room again."""


class Message(virtual.Message):
    """A message whose acknowledgement may fail, with a word and not with a traceback.

    It then comes again, and its row says what became of it.
    """

    def ack_log_error(self, logger: object, errors: Any, multiple: bool = False) -> None:
        try:
            self.ack(multiple=multiple)  # type: ignore[no-untyped-call]
        except errors as error:
            _say_unsettled("acknowledged", error)
            if isinstance(error, BrokenPipeError):  # Celery connects anew for this one
                raise

    def reject_log_error(self, logger: object, errors: Any, requeue: bool = False) -> None:
        try:
            self.reject(requeue=requeue)  # type: ignore[no-untyped-call]
        except errors as error:
            _say_unsettled("given back", error)


def _say_unsettled(what: str, error: Exception) -> None:
    sentence = "A message could not be %s (%s): it comes again, and its row is the truth."
    log.warning(sentence, what, type(error).__name__, extra={"action": "not_settled"})


class _Outliving:
    """What a channel does after its connection is gone works, or is a connection error: Celery logs
    that, and rescue sends again what could not be given back."""

    Message = Message
    QoS = QoS
    queue_budgets: Mapping[str, int] = MappingProxyType({})  #: most messages held, by queue
    shared_budgets: Mapping[str, int] = MappingProxyType({})  #: and of those that came by others

    def __init__(self, *args: Any, **options: Any) -> None:
        self._known: dict[bool, dict[str, Any]] = {}  #: how to reach Redis
        super().__init__(*args, **options)
        self._queue_cycle = Turns(self)
        self._connparams(asynchronous=False)  # while the transport knows

    def keeps(self, message: Any, queue: str) -> bool:
        """Whether a message that belongs to this queue stays, whichever list it was taken from.

        In a list that several models share, those of one model would hold up all behind them. So
        some stay beside what the model's own queue gives, and the others go on to that queue.
        """
        if queue not in self.queue_budgets:
            return True
        if message.delivery_info.get("routing_key") in self.queue_budgets:
            return True
        held: Counter[str] = self.qos.held  # type: ignore[attr-defined]
        shared = f"{SHARED}{queue}"
        if held[shared] < self.shared_budgets.get(queue, 0):
            self.qos.count(message.delivery_tag, shared)  # type: ignore[attr-defined]
            return True
        is_read = queue in self.active_queues  # type: ignore[attr-defined]
        if is_read and self._is_sated(queue) and self._pass_on(message, queue):
            return False
        self.qos.count(message.delivery_tag, queue)  # type: ignore[attr-defined]
        return True

    def _is_sated(self, queue: str) -> bool:
        budget = self.queue_budgets.get(queue)
        return budget is not None and self.qos.held[queue] >= budget  # type: ignore[attr-defined]

    def _pass_on(self, message: Any, queue: str) -> bool:
        """Whether it was moved to the new end of its queue."""
        properties = message.properties | {
            "delivery_tag": str(uuid4()),
            "delivery_info": {"exchange": "", "routing_key": queue},
        }
        item = message.serializable() | {"properties": properties}
        key = self._q_for_pri(queue, self._get_message_priority(item, reverse=False))  # type: ignore[attr-defined]
        try:
            self.qos.move(message.delivery_tag, key, dumps(item))  # type: ignore[attr-defined,no-untyped-call]
        except ResponseError as error:  # full, or without the right
            log.warning("%s A message is held here beyond its model's share.", said(error))
            return False
        return True

    def _brpop_start(self, timeout: float | None = None) -> None:
        if self._queue_cycle.leaves_out:
            timeout = LOOK_AGAIN_S
        super()._brpop_start(timeout)  # type: ignore[misc]

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        if asynchronous not in self._known:
            self._known[asynchronous] = super()._connparams(asynchronous)  # type: ignore[misc]
        return dict(self._known[asynchronous])

    def _size(self, queue: str) -> int:
        """Counted without a transaction: a full server refuses one that only reads, too."""
        with self.conn_or_acquire() as client:  # type: ignore[attr-defined]
            lists = (self._q_for_pri(queue, step) for step in self.priority_steps)  # type: ignore[attr-defined]
            return sum(client.llen(each) for each in lists)

    def _queue_bind(self, *args: Any) -> None:
        """A consumer takes from its list with or without this note; the next connection makes it.

        Workers that ran before have left it, too.
        """
        with _UnlessFull("a queue is not noted"):
            super()._queue_bind(*args)  # type: ignore[misc]


class Channel(_Outliving, redis.Channel):
    from_transport_options: Any = (
        *redis.Channel.from_transport_options,
        "queue_budgets",
        "shared_budgets",
    )


class SentinelChannel(_Outliving, redis.SentinelChannel):
    from_transport_options: Any = (
        *redis.SentinelChannel.from_transport_options,
        "queue_budgets",
        "shared_budgets",
    )


class Transport(redis.Transport):
    Channel = Channel
    connection_errors = (*redis.Transport.connection_errors, RedisError)


class SentinelTransport(redis.SentinelTransport):
    Channel = SentinelChannel
    connection_errors = (*redis.SentinelTransport.connection_errors, RedisError)
