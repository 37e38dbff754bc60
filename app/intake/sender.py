"""The sender: wakes workers for new jobs as well as it can, and never makes a submission fail.

    wanted ─▶ rows are written, those that are due as sent ─▶ commit ─▶ send

A job whose message is not sent now is `unsent`, and rescue sends it: because Redis did not take it,
because the job is not due, or because its queue is long enough. If this process ends before it has
sent what was written as sent, rescue finds these messages missing in Redis.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

from app.broker.message import Message
from app.broker.publisher import Publisher, bundled
from app.broker.queues import room
from app.config.settings import BrokerSettings
from app.errors import GristmillError, Unavailable
from app.store import delivery
from app.store.database import Database
from app.store.submissions import NewJob
from app.store.tenancy import EVERYBODY, acting_for

log = logging.getLogger(__name__)

BREAK_S: Final = 5.0
"""After a failed send nobody tries again for this long: submissions do not wait for Redis."""

PAGE_SIZE: Final = 1_000
"""Jobs whose messages are sent at once."""

LOOK_EVERY_S: Final = 0.5
"""How old the length of a queue may be that is held against the limit."""


class Sender:
    """Sends the messages of new jobs. Threads may share it.

    A send that fails opens a pause in which nobody tries, and at its end one caller does.
    """

    def __init__(self, database: Database, publisher: Publisher, broker: BrokerSettings) -> None:
        self._database = database
        self._publisher = publisher
        self._queues = Queues(publisher, broker.max_messages)
        self._lock = threading.Lock()
        self._try_again_at: float | None = None
        self.num_sent = 0
        self.num_left_to_rescue = 0

    def wanted(self, jobs: Sequence[NewJob]) -> set[UUID]:
        """Those of these new jobs whose messages are to be sent: their queues take them.

        Write them as sent if they are due, which is for Postgres to say, and then `send`. Rescue
        sends the others as soon as there is room, or time.
        """
        try:
            if not self._may_try():
                return set()
            taken = self._queues.take(jobs)
        except Unavailable as error:
            self._pause(error)
            return set()
        self._try_again_at = None
        return {job.id for job in taken}

    def send(self, jobs: Sequence[NewJob], num_left: int = 0) -> None:
        """Send the messages of jobs whose rows are committed and say that they are sent.

        Raises nothing: what cannot be sent is taken back, and what cannot be taken back is found.
        `num_left` jobs were left to rescue.
        """
        num_sent = 0
        try:
            for start in range(0, len(jobs), PAGE_SIZE):
                page = jobs[start : start + PAGE_SIZE]
                self._publisher.send_many(map(_message, page))
                num_sent += len(page)
        except Exception as error:  # the jobs are accepted, whatever it is
            self._pause(error)
            self._take_back([job.id for job in jobs[num_sent:]])
        with self._lock:
            self.num_sent += num_sent
            self.num_left_to_rescue += len(jobs) - num_sent + num_left

    def tell_cancelled(self, told: Mapping[UUID, Sequence[UUID]]) -> None:
        """Tell workers, by id, which of the jobs that they run were cancelled. Raises nothing: who
        is not told finds it in the row, with the next heartbeat."""
        with suppress(Unavailable), self._trying("Workers see cancels with their next heartbeat."):
            for worker_id, job_ids in told.items():
                self._publisher.tell_cancelled(worker_id, job_ids)

    def try_to_send(self) -> None:
        """Do what a message does to Redis. Raises `Unavailable`, as before where nobody tries."""
        with self._trying("Rescue sends later."):
            self._publisher.try_to_send()

    @contextmanager
    def _trying(self, otherwise: str) -> Iterator[None]:
        """Inside, Redis is spoken to; raises `Unavailable` while nobody is to, and begins that."""
        if not self._may_try():
            raise Unavailable("Redis did not answer, or refused; it is tried again in a moment.")
        try:
            yield
        except Unavailable as error:
            self._pause(error, otherwise)
            raise
        self._try_again_at = None

    def _pause(self, error: Exception, otherwise: str = "Rescue sends later.") -> None:
        self._try_again_at = time.monotonic() + BREAK_S
        said = error if isinstance(error, GristmillError) else type(error).__name__
        log.warning("%s %s", said, otherwise, extra={"action": "send_failed"})

    def _take_back(self, ids: Sequence[UUID]) -> None:
        try:
            for start in range(0, len(ids), PAGE_SIZE):
                with acting_for(EVERYBODY), self._database.autocommit() as connection:
                    delivery.not_sent(connection, ids[start : start + PAGE_SIZE])
        except GristmillError:
            extra = {"action": "not_sent_failed"}
            log.warning("Not sent, and not marked so: rescue finds them in a while.", extra=extra)

    def _may_try(self) -> bool:
        now = time.monotonic()
        with self._lock:
            if self._try_again_at is None:
                return True
            if now < self._try_again_at:
                return False
            self._try_again_at = now + BREAK_S
            return True


def _message(job: NewJob) -> Message:
    return Message(job.id, job.kind, job.model, job.request, job.url, job.priority, job.tenant)


@dataclass(slots=True)
class _Queue:
    """A queue of Redis as this process knows it, for one tenant."""

    lengths: list[int]  #: messages in its lists, by the steps of `Publisher.layout`
    own: list[int]  #: those of the tenant among them
    tenants: list[int]
    looked_at: float  #: monotonic
    held: set[int] = field(default_factory=set)  #: lists whose jobs are left to rescue


class Queues:
    """Which new jobs are worth a message: those that few enough messages would be served before.

    So an urgent job does not wait behind a queue that is full of patient ones, and these have a
    share of it, or a flood of urgent ones would keep them out for ever; so has each tenant. Once a
    list is full rescue alone feeds it, in order, until it is half empty: new jobs do not overtake
    those that were held back. If rescue is away, half of the limit goes on without it.

    Lengths are looked up now and then and counted up between, so the limit is kept to within what
    other processes send in `LOOK_EVERY_S`.
    """

    def __init__(self, publisher: Publisher, max_messages: int) -> None:
        self._publisher = publisher
        self._max = max_messages
        self._lock = threading.Lock()
        self._queues: dict[tuple[str, str], _Queue] = {}  #: by model and tenant

    def take(self, jobs: Sequence[NewJob]) -> list[NewJob]:
        """Those of the jobs that are to be sent now. Raises `Unavailable`."""
        for tenant in {job.tenant for job in jobs}:
            self._look({job.model for job in jobs if job.tenant == tenant}, tenant)
        with self._lock:
            return [
                job
                for group in bundled(jobs, self._publisher.bundle_size)
                if self._takes(self._queues[group[0].model, group[0].tenant], group[0].priority)
                for job in group
            ]

    def _look(self, models: set[str], tenant: str) -> None:
        oldest = time.monotonic() - LOOK_EVERY_S
        with self._lock:
            known = self._queues
            stale = [
                model
                for model in models
                if (model, tenant) not in known or known[model, tenant].looked_at <= oldest
            ]
        if not stale:
            return
        found = self._publisher.list_lengths(stale, tenant)
        now = time.monotonic()
        with self._lock:
            for model, lanes in found.items():
                before = known.get((model, tenant))
                known[model, tenant] = _Queue(
                    [each.all for each in lanes],
                    [each.own for each in lanes],
                    [each.tenants for each in lanes],
                    now,
                    before.held if before else set(),
                )

    def _takes(self, queue: _Queue, priority: int) -> bool:
        step = self._publisher.layout.step(priority)
        if step < 0:  # there are no more of them than callers who wait
            return True
        most = self._max // 2 if step in queue.held else self._max
        if room(queue.lengths, step, most, queue.own[step], queue.tenants[step]) < 1:
            queue.held.add(step)
            return False
        queue.held.discard(step)
        queue.lengths[step] += 1
        queue.own[step] += 1
        return True


def num_bytes(request: dict[str, Any]) -> int:
    """The size of a request as JSON in UTF-8."""
    return len(json.dumps(request, ensure_ascii=False).encode())
