"""Kombu's Redis channel, made to outlive its connection and a server that is full.

When Redis goes away kombu closes the connection's channels one by one and stops at the first that
fails. The consumer's own channel may be left open, on a transport that has forgotten where its
server is: giving back the unacknowledged messages, or acknowledging one later, is then an
AttributeError, which Celery takes for the end of the worker.

A full Redis still gives messages away, but does not let kombu note them as unacknowledged, and
refuses even to remove such a note in a transaction; that, too, would end the worker.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from kombu.transport import virtual
from redis.exceptions import OutOfMemoryError

log = logging.getLogger(__name__)


def outlive_connection(channel: Any) -> None:
    """Let a channel remember how to reach Redis. Call this while it is open.

    What it does after its connection is gone then either works or is a connection error, which
    Celery logs; rescue sends again what could not be given back.
    """
    channel._connparams = functools.cache(channel._connparams)
    channel._connparams(asynchronous=False)


def outlive_full_server(channel: Any) -> None:
    """Let a channel take and acknowledge messages of a Redis that stores nothing more.

    What it takes then is in this worker's hands alone: if it is lost with the worker, rescue sends
    it again, as any that is missing.
    """
    note, remove = channel.qos.append, channel.qos._remove_from_indices

    def append(message: Any, delivery_tag: str) -> None:
        try:
            note(message, delivery_tag)
        except OutOfMemoryError:
            log.warning("Redis is full; a message is held here alone.", extra={"action": "full"})
            virtual.QoS.append(channel.qos, message, delivery_tag)  # type: ignore[no-untyped-call]

    def remove_plainly(delivery_tag: str, pipe: Any = None) -> Any:
        if pipe is not None:
            return remove(delivery_tag, pipe)
        with channel.conn_or_acquire() as client:  # no transaction: it would be refused
            return remove(delivery_tag, client.pipeline(transaction=False))

    channel.qos.append = append
    channel.qos._remove_from_indices = remove_plainly
