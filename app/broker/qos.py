"""What a channel has taken and not yet acknowledged.

A full Redis still gives messages away, but lets kombu note neither that they are unacknowledged nor
which queues there are, and refuses even to remove such a note in a transaction. Each of these would
end the worker, or keep it from starting: and a worker is what empties a full Redis.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final
from uuid import uuid4

from kombu.transport import redis, virtual
from redis.exceptions import RedisError, ResponseError

from app import telemetry
from app.broker.message import num_jobs
from app.broker.refusal import said

log = logging.getLogger(__name__)
telemetry.say_once(log)

FULL: Final = "command not allowed when used memory"
"""What Redis answers when it is full, by itself or through a script."""


class UnlessFull:
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


class UnlessLost:
    """Do what is inside as far as the connection lasts."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        return isinstance(error, RedisError | OSError)


class QoS(redis.QoS):
    """The messages that were taken and not yet acknowledged, and how many jobs of them by queue.

    A message has as many jobs as it wakes and are not done. It counts for the queue that its sender
    wrote into it, or that `count_as` says it is of.

    What the server refused to note, full or for another reason, is in this worker's hands alone: if
    it is lost with the worker, rescue sends it again, as any that is missing.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]
        self.held: Counter[str] = Counter()
        self.prefix: Final = f"{uuid4()}:"  #: of the tags of messages that are noted already
        self._held_for: dict[str, list[Any]] = {}  #: by tag the queue, and the jobs left
        self._done: list[str] = []

    def append(self, message: Any, delivery_tag: str) -> None:
        queue = message.delivery_info.get("routing_key", "")
        self.count(delivery_tag, queue, num_jobs(message.headers))
        if delivery_tag.startswith(self.prefix):
            virtual.QoS.append(self, message, delivery_tag)  # type: ignore[no-untyped-call]
            return
        try:
            super().append(message, delivery_tag)  # type: ignore[no-untyped-call]
        except ResponseError as error:
            log.warning("%s A message is held here alone.", said(error))
            virtual.QoS.append(self, message, delivery_tag)  # type: ignore[no-untyped-call]

    def can_consume(self) -> bool:
        return not self.prefetch_count or self.held.total() < self.prefetch_count

    def can_consume_max_estimate(self) -> int | None:
        return max(self.prefetch_count - self.held.total(), 0) if self.prefetch_count else None

    def count(self, delivery_tag: str, queue: str, num_jobs: int = 1) -> None:
        """Count a message of so many jobs for this queue."""
        self._let_go(delivery_tag)
        self._held_for[delivery_tag] = [queue, num_jobs]
        self.held[queue] += num_jobs

    def count_as(self, delivery_tag: str, queue: str) -> None:
        """Count a message for this queue and for no other."""
        self.count(delivery_tag, queue, self._let_go(delivery_tag) or 1)

    def lighten(self, delivery_tag: str) -> None:
        """A job of a message is done."""
        if held := self._held_for.get(delivery_tag):
            held[1] -= 1
            self.held[held[0]] -= 1

    def ack(self, delivery_tag: str) -> None:
        """Its place is free at once, also where the server refuses or is away: it keeps its note
        then, and delivers again what is done by that time."""
        virtual.QoS.ack(self, delivery_tag)  # type: ignore[no-untyped-call]
        self._let_go(delivery_tag)
        self.drop(delivery_tag)

    def drop(self, delivery_tag: str) -> None:
        """Have the note of a message taken off, with all that is done by then."""
        self._done.append(delivery_tag)
        self.channel.settle_soon()

    def take_done(self) -> list[str]:
        """The tags whose notes are to be taken off now."""
        done, self._done = self._done, []
        return done

    def expect(self, delivery_tags: Iterable[str]) -> None:
        """Messages may be noted under these tags, for an answer was lost: they are given back with
        the channel."""
        for delivery_tag in delivery_tags:
            self._delivered.setdefault(delivery_tag, None)

    def restore_unacked(self, client: Any = None) -> None:
        """Each goes back to where it was taken from, the last one first, which keeps the order."""
        self._flush()  # type: ignore[no-untyped-call]
        with self.channel.conn_or_acquire(client) as client:
            for tag in reversed(self._delivered):
                self.restore_by_tag(tag, client=client)
        self._delivered.clear()

    def restore_by_tag(self, tag: str, *args: Any, **options: Any) -> None:
        """What is no message is given back to nobody: it was refused, or would be."""
        try:
            super().restore_by_tag(tag, *args, **options)  # type: ignore[no-untyped-call]
        except ValueError:
            log.warning("A message that is not JSON was dropped.")
            self._remove_from_indices(tag).execute()

    def move(self, items: Mapping[str, tuple[str, str]]) -> None:
        """Put items into lists, each in place of the message with this tag, at once or not at all.
        By tag the list's key, which kombu's client completes, and the item."""
        with self.pipe_or_acquire() as pipe:
            for delivery_tag, (key, item) in items.items():
                self._remove_from_indices(delivery_tag, pipe.lpush(key, item))
            pipe.execute()
        for delivery_tag in items:
            virtual.QoS.ack(self, delivery_tag)  # type: ignore[no-untyped-call]
            self._let_go(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        super().reject(delivery_tag, requeue)  # type: ignore[no-untyped-call]
        self._let_go(delivery_tag)

    def _let_go(self, delivery_tag: str) -> int:
        queue, num_jobs = self._held_for.pop(delivery_tag, ("", 0))
        self.held[queue] -= num_jobs
        return int(num_jobs)

    def _remove_from_indices(self, delivery_tag: str, pipe: Any = None) -> Any:
        if pipe is not None:
            return super()._remove_from_indices(delivery_tag, pipe)  # type: ignore[no-untyped-call]
        with self.channel.conn_or_acquire() as client:
            plain = client.pipeline(transaction=False)  # a transaction would be refused
            return super()._remove_from_indices(delivery_tag, plain)  # type: ignore[no-untyped-call]

    def restore_visible(self, *args: Any, **options: Any) -> None:
        """A full server has no room for the lock that this takes."""
        with UnlessFull("what dead workers held is left to rescue"):
            super().restore_visible(*args, **options)  # type: ignore[no-untyped-call]
