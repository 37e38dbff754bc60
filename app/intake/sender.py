"""The sender: wakes workers for new jobs as well as it can, and never makes a submission fail.

A job whose message is not sent now stays `queued` with `enqueued_at` null, and rescue sends it:
because Redis did not take it, because the job is not due, or because its queue is long enough.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from app.broker.message import Message
from app.broker.publisher import Publisher
from app.errors import Unavailable
from app.store import submissions
from app.store.database import Database
from app.store.submissions import NewJob

log = logging.getLogger(__name__)

MAX_INLINE_BYTES: Final = 256_000
"""Larger requests travel as a bare wake-up, so that Redis stays small and no message outgrows what
a worker takes. The row has the request."""

BREAK_S: Final = 5.0
"""After a failed send nobody tries again for this long: submissions do not wait for Redis."""

PAGE_SIZE: Final = 1_000
"""Messages that are sent, and marked as sent, at once."""

LOOK_EVERY_S: Final = 0.5
"""How old the length of a queue may be that is held against the limit."""


class Sender:
    """Sends the messages of new jobs. Threads may share it.

    A send that fails opens a pause in which nobody tries, and at its end one caller does.
    """

    def __init__(self, database: Database, publisher: Publisher, max_messages: int) -> None:
        self._database = database
        self._publisher = publisher
        self._queues = Queues(publisher, max_messages)
        self._lock = threading.Lock()
        self._try_again_at: float | None = None
        self.num_sent = 0
        self.num_left_to_rescue = 0

    def send(self, jobs: Sequence[NewJob]) -> None:
        """Jobs that are not due yet are left to rescue, which wakes them in time."""
        now = datetime.now(UTC)
        due = [job for job in jobs if job.not_before is None or job.not_before <= now]
        for start in range(0, len(due), PAGE_SIZE):
            page = due[start : start + PAGE_SIZE]
            num_sent = self._try(page) if self._may_try() else 0
            with self._lock:
                self.num_sent += num_sent
                self.num_left_to_rescue += len(page) - num_sent

    def _try(self, jobs: Sequence[NewJob]) -> int:
        """Send those that their queues take; how many."""
        try:
            taken = self._queues.take(jobs)
            self._publisher.send_many(map(_message, taken))
        except Unavailable as error:
            self._try_again_at = time.monotonic() + BREAK_S
            log.warning("%s Rescue sends later.", error, extra={"action": "send_failed"})
            return 0
        self._try_again_at = None
        if taken:
            self._mark(taken)
        return len(taken)

    def _mark(self, jobs: Iterable[NewJob]) -> None:
        try:
            with self._database.autocommit() as connection:
                submissions.mark_enqueued(connection, [job.id for job in jobs])
        except Unavailable:
            log.warning("Sent, but not marked so.", extra={"action": "mark_enqueued_failed"})

    def _may_try(self) -> bool:
        now = time.monotonic()
        with self._lock:
            if self._try_again_at is None:
                return True
            if now < self._try_again_at:
                return False
            self._try_again_at = now + BREAK_S
            return True


@dataclass(slots=True)
class _Queue:
    """A queue of Redis as this process knows it."""

    lengths: list[int]  #: of its lists, by the steps of `Publisher.layout`
    looked_at: float  #: monotonic
    held: set[int] = field(default_factory=set)  #: lists whose jobs are left to rescue


class Queues:
    """Which new jobs are worth a message: those that few enough messages would be served before.

    So an urgent job does not wait behind a queue that is full of patient ones. Once a list is full
    rescue alone feeds it, in order, until it is half empty: new jobs do not overtake those that
    were held back. If rescue is away, half of the limit goes on without it.

    Lengths are looked up now and then and counted up between, so the limit is kept to within what
    other processes send in `LOOK_EVERY_S`.
    """

    def __init__(self, publisher: Publisher, max_messages: int) -> None:
        self._publisher = publisher
        self._max = max_messages
        self._lock = threading.Lock()
        self._queues: dict[str, _Queue] = {}

    def take(self, jobs: Sequence[NewJob]) -> list[NewJob]:
        """Those of the jobs that are to be sent now. Raises `Unavailable`."""
        self._look({job.model for job in jobs})
        with self._lock:
            return [job for job in jobs if self._takes(self._queues[job.model], job.priority)]

    def _look(self, models: set[str]) -> None:
        oldest = time.monotonic() - LOOK_EVERY_S
        with self._lock:
            known = self._queues
            stale = [
                each for each in models if each not in known or known[each].looked_at <= oldest
            ]
        if not stale:
            return
        found = self._publisher.list_lengths(stale)
        now = time.monotonic()
        with self._lock:
            for model, lengths in found.items():
                held = known[model].held if model in known else set()
                known[model] = _Queue(lengths, now, held)

    def _takes(self, queue: _Queue, priority: int) -> bool:
        step = self._publisher.layout.step(priority)
        ahead = sum(queue.lengths[: step + 1])
        if ahead >= (self._max // 2 if step in queue.held else self._max):
            queue.held.add(step)
            return False
        queue.held.discard(step)
        queue.lengths[step] += 1
        return True


def _message(job: NewJob) -> Message:
    is_inline = num_bytes(job.request) <= MAX_INLINE_BYTES
    return Message(
        job_id=job.id,
        kind=job.kind,
        model=job.model,
        request=job.request if is_inline else None,
        url=job.url if is_inline else None,
        priority=job.priority,
    )


def num_bytes(request: dict[str, Any]) -> int:
    """The size of a request as JSON in UTF-8."""
    return len(json.dumps(request, ensure_ascii=False).encode())
