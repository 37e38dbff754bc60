"""Kombu's Redis transport, made to outlive its connection and a server that is full.

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
from typing import Any, Final

from kombu.transport import redis, virtual
from redis.exceptions import ResponseError

log = logging.getLogger(__name__)

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
    """The messages that were taken and not yet acknowledged.

    What a full server could not note is in this worker's hands alone: if it is lost with the
    worker, rescue sends it again, as any that is missing.
    """

    def append(self, message: Any, delivery_tag: str) -> None:
        with _UnlessFull("a message is held here alone"):
            super().append(message, delivery_tag)  # type: ignore[no-untyped-call]
            return
        virtual.QoS.append(self, message, delivery_tag)  # type: ignore[no-untyped-call]

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


class _Outliving:
    """What a channel does after its connection is gone works, or is a connection error: Celery logs
    that, and rescue sends again what could not be given back."""

    QoS = QoS

    def __init__(self, *args: Any, **options: Any) -> None:
        self._known: dict[bool, dict[str, Any]] = {}  #: how to reach Redis
        super().__init__(*args, **options)
        self._connparams(asynchronous=False)  # while the transport knows

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
    pass


class SentinelChannel(_Outliving, redis.SentinelChannel):
    pass


class Transport(redis.Transport):
    Channel = Channel


class SentinelTransport(redis.SentinelTransport):
    Channel = SentinelChannel
