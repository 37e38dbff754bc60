"""Rescue: the process that gives back what died with a worker or was lost in Redis.

A sweep looks, in this order, for

    running jobs of workers whose lease is over      → queued again, or at their last state
    queued jobs whose message such a worker had      → to be sent again
    queued jobs past their deadline                  → expired; running ones are their worker's
    what has been kept for its time                  → requests and responses removed, jobs deleted
    jobs that are due and were never sent            → sent, as far as their queue has room
    jobs whose message is missing in Redis           → sent again

and adds up what ended jobs used, see `app.store.usage`.

All but the last two need Postgres alone and go on while Redis is away. Messages carry no request:
the worker reads it from the row. A queue takes up to `broker.max_messages`, so that Redis stays
small whatever waits in Postgres; the rest is sent as the queue drains, urgent jobs first, then old
ones.

What cannot be done now, for a lock or for a row, is left to the next sweep, and all else is done.

Several may run at once: they skip each other's rows, and rows are marked and committed before their
messages are sent, so each message is sent by one of them and no lock is held meanwhile.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from app.alive import Alive
from app.broker.lanes import Length
from app.broker.message import Message
from app.broker.publisher import Publisher, bundled
from app.broker.queues import room
from app.config.settings import Settings
from app.errors import GristmillError, SchemaError, Unavailable
from app.intake.batches.keeper import BatchKeeper
from app.intake.file_keeper import FileKeeper
from app.store import delivery, months, retention, shares, sweeps, usage, webhooks
from app.store.contact import Contact
from app.store.database import Database
from app.store.delivery import WakeUp
from app.store.months import Month
from app.store.pages import Pages
from app.store.translation import Locked, TookTooLong
from app.threads import beside

log = logging.getLogger(__name__)

MAX_PAGES: Final = 20
"""Of one kind of work in one sweep, so that none keeps the others waiting."""

MAX_RETENTION_PAGES: Final = 10
"""The same for what nobody waits for."""


SMALL_PAGE: Final = 20_000
"""Small rows that are handled at once: keys of old jobs, usage that is added to its hour."""

FOLD_EVERY_S: Final = 10.0
"""Between additions of usage to its hours: questions sum what is added and what is not."""

MONTHS_EVERY_S: Final = 60.0
"""Between looks whether a month is to be made or dropped: either may have to wait for a lock, and
everybody else behind it."""

REMOVE_EVERY_S: Final = 10.0
"""Between looks for what has been kept for its time, while nothing is found: nobody waits for it,
and it is as much to ask as all else of a sweep."""

FIRST_ID: Final = UUID(int=0)

DAY_S: Final = 86_400

MAX_SENT: Final = 1_000
"""Messages that are marked and sent at once."""

MAX_LOOKED_FOR: Final = 100_000
"""Messages of one model that are looked for in Redis at once, the oldest; more in longer queues."""

LOOK_SHARE: Final = 20
"""Looking for messages takes at most one part in so many of the time."""

MAX_PAUSE_S: Final = 5.0
"""Longest pause between sweeps while Postgres or Redis is away."""

LOOKS_PER_LEASE: Final = 8
"""However long a pause is, Postgres is asked so often whether it is there."""


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
        self._models = tuple(settings.models)
        self._max_messages = settings.broker.max_messages
        self._lease_s = settings.worker.lease_s
        self._retention = settings.retention
        self._hooks_days = settings.webhooks.keep_days
        self._database = database
        self._publisher = publisher
        self._now_s = now_s
        self._contact = Contact(self._lease_s / 2, now_s)
        self._pages = Pages(self._begin, settings.rescue.page_size, now_s)
        self._page = settings.rescue.page_size
        self._months_at = 0.0
        self._remove_at = 0.0
        self._small = Pages(self._begin, SMALL_PAGE, now_s)
        self._fold_at = 0.0
        self._forgotten: dict[Month, UUID] = {}  #: months that are going, and how far they are
        self._missing: frozenset[UUID] = frozenset()
        self._look_again_at = 0.0
        self._hindered: dict[str, str] = {}  #: kinds of work that cannot be done, and why

    @contextmanager
    def _begin(self) -> Iterator[Any]:
        try:
            with self._database.begin() as connection:
                yield connection
        except (Locked, TookTooLong):
            self._contact.answered()  # by a Postgres that is there
            raise
        self._contact.answered()

    def stay_in_contact(self) -> None:
        """Ask Postgres whether it is there: who pauses for long could not say later who was lost.

        Raises `SchemaError` if the schema does not fit this code any more.
        """
        with suppress(Unavailable):
            self._database.check_schema()
            self._contact.answered()

    def sweep(self) -> SweepReport:
        """Do all there is to do, up to `MAX_PAGES` of each kind.

        Raises `Unavailable` when Postgres or Redis is away; what was done until then stays done.
        """
        worker_lost, message_lost = self._free_the_lost()
        self._told("Adding up usage.", self._fold)
        return SweepReport(
            worker_lost=worker_lost,
            message_lost=message_lost,
            expired=self._told(
                "Jobs expired in the queue.",
                lambda name: self._pages.move(
                    name, sweeps.find_late, sweeps.expire_deadlines, MAX_PAGES
                ),
            ),
            removed=self._remove_old(),
            sent=self._send_due(),
            sent_again=self._send_missing(),
        )

    def _told(self, sentence: str, work: Callable[[str], int]) -> int:
        """Do a work and log how many rows it moved, if any; none if it has to wait for a lock, say.

        Whatever holds up one kind of work is nothing to the others.
        """
        try:
            rows = work(sentence)
        except GristmillError as error:
            is_hindered = isinstance(error, Locked | TookTooLong)
            if isinstance(error, Unavailable | SchemaError) and not is_hindered:
                raise
            self._tell_hindered(sentence, str(error))
            return 0
        self._hindered.pop(sentence, None)
        if rows:
            log.info(sentence, extra={"action": "sweep", "rows": rows})
        return rows

    def _tell_hindered(self, sentence: str, why: str) -> None:
        """Once, however often it is tried."""
        if self._hindered.get(sentence) != why:
            extra = {"action": "hindered", "work": sentence}
            log.error("A part of the sweep cannot be done now: %s", why, extra=extra)
        self._hindered[sentence] = why

    def _free_the_lost(self) -> tuple[int, int]:
        """What lost workers ran, and what they held. Nobody is lost until he had time to renew his
        lease: all of a lease since this process reached Postgres, or reached it again."""
        if self._contact.lasts_s < self._lease_s:
            return 0, 0
        ran = self._told(
            "Took jobs from workers that are gone.",
            lambda name: self._pages.move(name, sweeps.find_lost, sweeps.expire_leases, MAX_PAGES),
        )
        held = self._told(
            "Workers that are gone had messages.",
            lambda name: self._pages.repeat(name, delivery.free_lost, MAX_PAGES),
        )
        return ran, held

    def _fold(self, name: str) -> int:
        """Nothing to tell of: it is done all the time."""
        if self._now_s() >= self._fold_at:
            self._fold_at = self._now_s() + FOLD_EVERY_S
            self._small.repeat(name, usage.fold, MAX_PAGES)
        return 0

    def _make_months(self) -> int:
        with self._begin() as connection:
            return months.prepare(connection)

    def _drop_months(self) -> int:
        """Whole months go where nothing in them is to be kept; how many tables."""
        kept = self._retention
        with self._begin() as connection:
            asked = months.over(connection, "requests", kept.prompts_days * DAY_S)
            for month in asked:
                months.drop(connection, month, ["requests"])
        with self._begin() as connection:
            ended = months.over(connection, "results", kept.jobs_days * DAY_S)
        return len(asked) + sum(map(self._forget, ended))

    def _forget(self, month: Month) -> int:
        """Delete the keys of a month's jobs, some in each sweep, and in the end the month; how many
        tables were dropped."""
        after, dropped = self._forgotten.get(month, FIRST_ID), 0

        def step(connection: Any, size: int) -> int:
            nonlocal after, dropped
            last = months.forget(connection, month, after, size)
            if last is None:
                dropped = months.drop(connection, month)
                return 0
            after = last
            return size

        self._small.repeat("Forgot old jobs.", step, MAX_RETENTION_PAGES)
        if dropped:
            self._forgotten.pop(month, None)
        else:  # there are more keys: on with the next sweep
            self._forgotten[month] = after
            self._months_at = self._now_s()
        return dropped

    def _remove_old(self) -> int:
        if self._now_s() >= self._months_at:
            self._months_at = self._now_s() + MONTHS_EVERY_S
            self._told("Made tables for the months to come.", lambda _: self._make_months())
            self._told("Dropped tables of old months.", lambda _: self._drop_months())
        if self._now_s() < self._remove_at:
            return 0
        kept = self._retention
        steps: tuple[tuple[Callable[..., int], float, str], ...] = (
            (retention.remove_requests, kept.prompts_days, "Removed requests of old jobs."),
            (retention.redact_responses, kept.results_days, "Removed responses of old jobs."),
            (retention.delete_lines, kept.results_days, "Deleted lines of old batches."),
            (retention.delete_callers_batches, kept.jobs_days, "Deleted old batches of callers."),
            (retention.delete_windows, kept.jobs_days, "Deleted windows of long ago."),
            (retention.delete_jobs, kept.jobs_days, "Deleted old jobs."),
            (retention.delete_batches, kept.jobs_days, "Deleted batches of old jobs."),
            (webhooks.delete_deliveries, self._hooks_days, "Deleted old webhooks."),
        )
        removed = sum(self._remove(sentence, step, days) for step, days, sentence in steps)
        if not removed:
            self._remove_at = self._now_s() + REMOVE_EVERY_S
        return removed

    def _remove(self, sentence: str, step: Callable[..., int], days: float) -> int:
        def remove(connection: Any, size: int) -> int:
            return step(connection, days * DAY_S, size)

        return self._told(
            sentence, lambda name: self._pages.repeat(name, remove, MAX_RETENTION_PAGES)
        )

    def _send_due(self) -> int:
        """Fill the queues with what is unsent, each up to its limit."""
        self._publisher.ring(self._models)
        with self._begin() as connection:
            self._publisher.set_weights(shares.weights(connection))
            unsent = delivery.unsent(connection)
        sent = sum(self._fill(model, tenant) for model, tenant in unsent)
        if sent:
            extra = {"action": "send_due", "jobs": sent}
            log.info("Sent jobs that were due and never sent.", extra=extra)
        return sent

    def _fill(self, model: str, tenant: str) -> int:
        """Send the unsent jobs of one model and tenant as far as its lists take their messages."""
        lengths = self._publisher.list_lengths([model], tenant)[model]
        filled = [each.all for each in lengths]
        return sum(
            sent
            for step, priorities in enumerate(self._publisher.layout.bands)
            for sent in self._send_pages(model, tenant, step, priorities, filled, lengths[step])
        )

    def _send_pages(
        self,
        model: str,
        tenant: str,
        step: int,
        priorities: Sequence[int],
        filled: list[int],
        before: Length,
    ) -> Iterator[int]:
        """Yields how many jobs were sent, and counts their messages in `filled`."""
        for _ in range(MAX_PAGES):
            own = before.own + filled[step] - before.all
            free = int(room(filled, step, self._max_messages, own, before.tenants))
            page = min(free * self._publisher.bundle_size(model), self._page)
            if page <= 0:
                break
            with self._begin() as connection:
                wake_ups = delivery.send_due(connection, model, priorities, page, tenant=tenant)
            yield self._send(wake_ups)
            filled[step] += sum(1 for _ in bundled(wake_ups, self._publisher.bundle_size))
            if len(wake_ups) < page:
                break

    def _send(self, wake_ups: Sequence[WakeUp]) -> int:
        """Send what was marked as sent; nothing is locked meanwhile."""
        try:
            self._publisher.send_many(map(_message, wake_ups))
        except Unavailable:
            with self._begin() as connection:
                delivery.not_sent(connection, [wake_up.id for wake_up in wake_ups])
            raise
        return len(wake_ups)

    def _send_missing(self) -> int:
        """Send again what this look at Redis and the one before both found missing there.

        Jobs that wait long are the rule in a long queue, so the queue itself is looked into. A
        message that a worker has just taken is missing too, but not any more at the next look.
        """
        if self._now_s() < self._look_again_at:
            return 0  # looking at many messages takes a while, so it waits for many times as long
        began_s = self._now_s()
        missing = self._find_missing()
        # A look may be slow for once, for a lock say: that is no reason to look away for long.
        pause_s = min(LOOK_SHARE * (self._now_s() - began_s), self._lost_after_s)
        self._look_again_at = began_s + pause_s if pause_s > self._sweep_s else 0.0
        lost = sorted(missing & self._missing)
        self._missing = frozenset(missing)
        return sum(
            self._send_again(lost[start : start + MAX_SENT])
            for start in range(0, len(lost), MAX_SENT)
        )

    def _find_missing(self) -> set[UUID]:
        with self._begin() as connection:
            # More than can be there in Redis, or those would hide a lost one behind them.
            most = max(MAX_LOOKED_FOR, 2 * self._max_messages)
            late = delivery.overdue(connection, self._lost_after_s, most)
        return self._publisher.without_message(late) if late else set()

    def _send_again(self, ids: Sequence[UUID]) -> int:
        with self._begin() as connection:
            wake_ups = delivery.send_again(connection, ids, self._lost_after_s)
        if wake_ups:
            extra = {"action": "send_again", "jobs": len(wake_ups)}
            log.warning("Messages were lost in Redis and are sent again.", extra=extra)
        return self._send(wake_ups)


def _message(wake_up: WakeUp) -> Message:
    return Message(
        wake_up.id,
        wake_up.kind,
        wake_up.model,
        priority=wake_up.priority,
        tenant=wake_up.tenant,
    )


def serve(settings: Settings) -> None:
    """Sweep until SIGTERM or SIGINT; wait out times without Postgres or Redis.

    Raises `SchemaError` if the database does not fit this code, and `ConfigError` for a storage of
    files that cannot be.
    """
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    given = settings.database
    database = Database(
        given.url,
        pool_size=1,
        application_name="gristmill rescue",
        connect_timeout_s=given.connect_timeout_s,
        statement_timeout_ms=given.statement_timeout_ms,
        lock_timeout_ms=given.lock_timeout_ms,
    )
    publisher = Publisher(settings)
    alive(settings).forget()  # what an earlier process noted says nothing
    try:
        with (
            beside("files", FileKeeper(settings).keep),
            beside("batches", BatchKeeper(settings).keep),
        ):
            _sweep_until(stop, Rescue(settings, database, publisher), settings, database)
    finally:
        alive(settings).forget()
        publisher.close()
        database.close()


def _sweep_until(
    stop: threading.Event, rescuer: Rescue, settings: Settings, database: Database
) -> None:
    sweep_s = settings.rescue.sweep_ms / 1000
    pause_s = 0.0
    is_schema_checked = False
    while not _pause(stop, pause_s, settings, rescuer):
        try:
            if not is_schema_checked:
                database.check_schema()
                is_schema_checked = True
                log.info("Rescue is up.", extra={"action": "start"})
            rescuer.sweep()
        except Unavailable as error:
            pause_s = min(max(2 * pause_s, sweep_s), MAX_PAUSE_S)
            log.warning("%s Trying again.", error, extra={"action": "wait", "pause_s": pause_s})
            alive(settings).note(has_worked=False)
        else:
            pause_s = sweep_s
            alive(settings).note(has_worked=True)


def _pause(stop: threading.Event, pause_s: float, settings: Settings, rescuer: Rescue) -> bool:
    """Wait, in contact with Postgres; whether to stop."""
    until_s = time.monotonic() + pause_s
    look_s = settings.worker.lease_s / LOOKS_PER_LEASE
    while (left_s := until_s - time.monotonic()) > look_s:
        if stop.wait(look_s):
            return True
        rescuer.stay_in_contact()
    return stop.wait(max(0.0, left_s))


def alive(settings: Settings) -> Alive:
    """Of rescue processes with this cache folder."""
    return Alive(settings.cache_dir, "rescue")
