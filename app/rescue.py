"""Rescue: the process that gives back what died with a worker or was lost in Redis.

A sweep looks, in this order, for

    running jobs of workers whose lease is over      → queued again, or at their last state
    queued jobs whose message such a worker had      → to be sent again
    queued jobs past their deadline                  → expired; running ones are their worker's
    what has been kept for its time                  → requests and responses removed, jobs deleted
    jobs that are due and were never sent            → sent, as far as their queue has room
    jobs whose message is missing in Redis           → sent again

The first four need Postgres alone and go on while Redis is away. Messages carry no request: the
worker reads it from the row. A queue takes up to `broker.max_messages`, so that Redis stays small
whatever waits in Postgres; the rest is sent as the queue drains, urgent jobs first, then old ones.

Several may run at once: they skip each other's rows. A job that was never sent is then sent once;
a message that is missing is sent at most once by each of them.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final
from uuid import UUID

from app.broker.message import Message
from app.broker.publisher import Publisher
from app.config.settings import Settings
from app.errors import Unavailable
from app.store import retention, submissions, sweeps
from app.store.database import Database
from app.store.sweeps import WakeUp

log = logging.getLogger(__name__)

MAX_PAGES: Final = 20
"""Of one kind of work in one sweep, so that none keeps the others waiting."""

MAX_RETENTION_PAGES: Final = 10
"""The same for what nobody waits for."""

SEND_GRACE_S: Final = 3.0
"""Time for whoever wrote a job to send its message; after that it was held back, or lost."""

DAY_S: Final = 86_400

MAX_SENT_AGAIN: Final = 2_000
"""Messages of one model in one sweep; their rows stay locked while they are sent."""

COUNT_SHARE: Final = 20
"""Counting the queue takes at most one part in so many of the time."""

MAX_PAUSE_S: Final = 5.0
"""Longest pause between sweeps while Postgres or Redis is away."""

ALIVE_S: Final = 60.0
"""A rescue process that has not swept for this long is not alive."""


@dataclass(frozen=True, slots=True)
class SweepReport:
    """How many jobs a sweep moved, by what had happened to them."""

    worker_lost: int  #: ran on a worker that is gone
    message_lost: int  #: had been received by a worker that is gone
    expired: int  #: queued past their deadline
    removed: int  #: requests, responses, jobs and batches that were kept for their time
    sent: int  #: due and never sent
    sent_again: int  #: missing in Redis


class Rescue:
    """Sweeps once per call. Not for several threads at once."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        publisher: Publisher,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sweep_s = settings.rescue.sweep_ms / 1000
        self._lost_after_s = settings.rescue.lost_after_s
        self._grace_s = min(SEND_GRACE_S, self._lost_after_s)
        self._page = settings.rescue.page_size
        self._max_messages = settings.broker.max_messages
        self._retention = settings.retention
        self._database = database
        self._publisher = publisher
        self._now_s = now_s
        self._suspects: frozenset[UUID] = frozenset()
        self._count_again_at = 0.0

    def sweep(self) -> SweepReport:
        """Do all there is to do, up to `MAX_PAGES` of each kind.

        Raises `Unavailable` when Postgres or Redis is away; what was done until then stays done.
        """
        return SweepReport(
            worker_lost=self._pages(self._expire_leases, "Took jobs from workers that are gone."),
            message_lost=self._pages(self._return_received, "Workers that are gone had messages."),
            expired=self._pages(self._expire_deadlines, "Jobs expired in the queue."),
            removed=self._remove_old(),
            sent=self._send_unsent(),
            sent_again=self._send_missing(),
        )

    def _pages(self, step: Callable[[], int], sentence: str, most: int = MAX_PAGES) -> int:
        """Repeat a step, each time a page in a transaction of its own, until a page is not full."""
        total = 0
        for _ in range(most):
            done = step()
            total += done
            if done < self._page:
                break
        if total:
            log.info(sentence, extra={"action": "sweep", "rows": total})
        return total

    def _expire_leases(self) -> int:
        with self._database.begin() as connection:
            return len(sweeps.expire_leases(connection, self._page))

    def _return_received(self) -> int:
        with self._database.begin() as connection:
            return sweeps.return_received(connection, self._page)

    def _expire_deadlines(self) -> int:
        with self._database.begin() as connection:
            return len(sweeps.expire_deadlines(connection, self._page))

    def _remove_old(self) -> int:
        kept = self._retention
        steps: tuple[tuple[Callable[..., int], float, str], ...] = (
            (retention.redact_requests, kept.prompts_days, "Removed requests of old jobs."),
            (retention.redact_responses, kept.results_days, "Removed responses of old jobs."),
            (retention.delete_jobs, kept.jobs_days, "Deleted old jobs."),
            (retention.delete_batches, kept.jobs_days, "Deleted batches of old jobs."),
        )
        return sum(
            self._pages(partial(self._remove, step, days), sentence, MAX_RETENTION_PAGES)
            for step, days, sentence in steps
        )

    def _remove(self, step: Callable[..., int], days: float) -> int:
        with self._database.begin() as connection:
            return step(connection, days * DAY_S, self._page)

    def _send_unsent(self) -> int:
        """Fill the queues with what was never sent, each up to its limit."""
        with self._database.begin() as connection:
            models = sweeps.unsent_models(connection)
        if not models:
            return 0
        lengths = self._publisher.list_lengths(models)
        sent = sum(self._fill(model, lengths[model]) for model in models)
        if sent:
            extra = {"action": "send_unsent", "jobs": sent}
            log.info("Sent jobs that were due and never sent.", extra=extra)
        return sent

    def _fill(self, model: str, lengths: Sequence[int]) -> int:
        """Send the unsent jobs of one model as long as few enough messages would be served first.

        So a queue full of patient jobs does not keep an urgent one in Postgres.
        """
        sent = ahead = 0
        for priorities, length in zip(self._publisher.layout.bands, lengths, strict=True):
            ahead += length
            sent += self._send_pages(model, priorities, self._max_messages - ahead - sent)
        return sent

    def _send_pages(self, model: str, priorities: Sequence[int], room: int) -> int:
        sent = 0
        for _ in range(MAX_PAGES):
            page = min(room - sent, self._page)
            done = self._send_page(model, priorities, page) if page > 0 else 0
            sent += done
            if done < page or page <= 0:
                break
        return sent

    def _send_page(self, model: str, priorities: Sequence[int], page: int) -> int:
        with self._database.begin() as connection:
            wake_ups = sweeps.unsent(connection, model, priorities, page, self._grace_s)
            self._publisher.send_many(map(_message, wake_ups))
            submissions.mark_enqueued(connection, [wake_up.id for wake_up in wake_ups])
        return len(wake_ups)

    def _send_missing(self) -> int:
        """Send again what this sweep and the one before both found missing in Redis.

        Jobs that wait long are the rule in a long queue, so only as many are suspects as the queue
        is shorter than the number of jobs that should be in it: the oldest. A message that a worker
        has just taken is missing too, but not any more at the next sweep.
        """
        if self._now_s() < self._count_again_at:
            return 0  # counting a million rows takes a while, so it waits for many times as long
        suspects: set[UUID] = set()
        sent = 0
        for model, missing in self._num_missing().items():
            with self._database.begin() as connection:
                limit = min(missing, MAX_SENT_AGAIN)
                found = sweeps.overdue(connection, model, self._lost_after_s, limit)
                lost = [wake_up for wake_up in found if wake_up.id in self._suspects]
                self._publisher.send_many(map(_message, lost))
                submissions.mark_enqueued(connection, [wake_up.id for wake_up in lost])
            suspects.update(wake_up.id for wake_up in found)
            if lost:
                extra = {"action": "send_missing", "model": model, "jobs": len(lost)}
                log.warning("Messages were lost in Redis and sent again.", extra=extra)
            sent += len(lost)
        self._suspects = frozenset(suspects)
        return sent

    def _num_missing(self) -> dict[str, int]:
        """By how much each model's queue is shorter than it should be; only those that are."""
        began = self._now_s()
        with self._database.begin() as connection:
            expected = sweeps.count_unreceived(connection)
        # A count may be slow for once, for a lock say: that is no reason to look away for long.
        pause_s = min(COUNT_SHARE * (self._now_s() - began), self._lost_after_s)
        self._count_again_at = began + pause_s if pause_s > self._sweep_s else 0.0
        if not expected:
            return {}
        lengths = self._publisher.queue_lengths(expected)
        return {
            model: number - lengths[model]
            for model, number in expected.items()
            if number > lengths[model]
        }


def _message(wake_up: WakeUp) -> Message:
    return Message(wake_up.id, wake_up.kind, wake_up.model, priority=wake_up.priority)


def serve(settings: Settings) -> None:
    """Sweep until SIGTERM or SIGINT; wait out times without Postgres or Redis.

    Raises `SchemaError` if the database does not fit this code.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    given = settings.database
    database = Database(
        given.url,
        pool_size=2,
        application_name="gristmill rescue",
        connect_timeout_s=given.connect_timeout_s,
        statement_timeout_ms=given.statement_timeout_ms,
        lock_timeout_ms=given.lock_timeout_ms,
    )
    publisher = Publisher(settings)
    _alive_file(settings).unlink(missing_ok=True)  # that of an earlier process says nothing
    try:
        _sweep_until(stop, Rescue(settings, database, publisher), settings, database)
    finally:
        _alive_file(settings).unlink(missing_ok=True)
        publisher.close()
        database.close()


def _sweep_until(
    stop: threading.Event, rescuer: Rescue, settings: Settings, database: Database
) -> None:
    sweep_s = settings.rescue.sweep_ms / 1000
    pause_s = 0.0
    is_schema_checked = False
    while not stop.wait(pause_s):
        try:
            if not is_schema_checked:
                database.check_schema()
                is_schema_checked = True
                log.info("Rescue is up.", extra={"action": "start"})
            rescuer.sweep()
        except Unavailable as error:
            pause_s = min(max(2 * pause_s, sweep_s), MAX_PAUSE_S)
            log.warning("%s Trying again.", error, extra={"action": "wait", "pause_s": pause_s})
        else:
            pause_s = sweep_s
            _note_alive(settings)


# ── liveness ────────────────────────────────────────────────────────────────────────────────────


def _alive_file(settings: Settings) -> Path:
    return Path(settings.cache_dir) / "rescue.alive"


def _note_alive(settings: Settings) -> None:
    file = _alive_file(settings)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()


def is_alive(settings: Settings) -> bool:
    """Whether a rescue process with this cache folder has swept within the last `ALIVE_S`."""
    try:
        return time.time() - _alive_file(settings).stat().st_mtime < ALIVE_S
    except FileNotFoundError:
        return False
