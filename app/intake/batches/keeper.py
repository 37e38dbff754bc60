"""The keeper of batches: a thread of rescue that takes every open batch a step further, in turns.

    validating     a slice of its lines is read
    in_progress    a page of lines become jobs, the ends of jobs become outcomes
    cancelling     jobs are cancelled, the other lines are noted
    no open line   a page of its files is written; at the end it is there, and the batch has ended

What a step did is committed, and all that a step needs is in the rows: whoever comes next goes on.
Several processes share the batches, each under a lease. No step is long, so that a large batch
keeps no other one waiting.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final
from uuid import UUID

from app.batches import BatchState
from app.broker.publisher import Publisher
from app.config.settings import Settings
from app.engines.catalog import load_catalog
from app.errors import GristmillError, ModelNotFound, ObjectMissing
from app.intake.batches import output_file
from app.intake.batches.feed import Feed
from app.intake.batches.output_file import Writing
from app.intake.batches.scan import Scan
from app.intake.submit import Submitter
from app.jobs import new_id
from app.objects import Objects
from app.requests.bodies import Url
from app.store import batch_work, cancellation
from app.store.batch_work import LineError, NotHeld
from app.store.database import Database
from app.store.job_batches import BatchView
from app.threads import place_of

log = logging.getLogger(__name__)

LEASE_S: Final = 15.0
"""A batch whose keeper was killed goes on after this."""

MAX_BATCHES: Final = 200
"""That one process works on at once, the oldest."""

IDLE_S: Final = 0.5
BUSY_S: Final = 0.01
"""Between two rounds: while nothing happens, and while something does."""

COLLECTED: Final = 1_000
CANCELLED: Final = 200
"""Lines, and jobs, of one step."""

LOST_EVERY_S: Final = 30.0
"""Between looks for jobs of open lines that somebody deleted."""

AWAY_S: Final = 2.0
"""Pause while Postgres or the storage is away."""


class BatchKeeper:
    """Not for several threads at once; several processes may each have one."""

    def __init__(
        self,
        settings: Settings,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises `ConfigError` if the storage of files cannot be."""
        self.id = new_id()
        self._settings = settings
        given = settings.database
        self._database = Database(
            given.url,
            pool_size=2,
            application_name="gristmill batches",
            connect_timeout_s=given.connect_timeout_s,
            statement_timeout_ms=given.statement_timeout_ms,
            lock_timeout_ms=given.lock_timeout_ms,
        )
        self._objects = Objects.of(settings)
        self._now_s = now_s
        self._publisher = Publisher(settings)
        self._feed: Feed | None = None  # with its tokenizers, when there is a batch
        self._submitter: Submitter | None = None
        self._scan: tuple[UUID, Scan] | None = None  #: one at a time
        self._writing: Writing | None = None  #: the same
        self._look_for_lost_at: dict[UUID, float] = {}
        self._told: dict[UUID, str] = {}

    def keep(self, stop: threading.Event) -> None:
        """Work until it is to stop, and leave the rest to others."""
        told = ""
        try:
            while not stop.is_set():
                try:
                    has_moved = self.round(stop)
                    told = ""
                except GristmillError as error:
                    if str(error) != told:
                        log.warning("Batches wait: %s", error, extra={"action": "batches_wait"})
                    told, has_moved = str(error), False
                    stop.wait(AWAY_S)
                stop.wait(BUSY_S if has_moved else IDLE_S)
        finally:
            self._release()
            self.close()

    def close(self) -> None:
        self._publisher.close()
        self._database.close()

    def round(self, stop: threading.Event | None = None) -> bool:
        """A step of each open batch; whether anything has moved."""
        with self._database.begin() as connection:
            held = batch_work.take(connection, self.id, LEASE_S, MAX_BATCHES)
        self._forget_others({batch.id for batch in held})
        has_moved = False
        for batch in held:
            if stop is not None and stop.is_set():
                break
            has_moved = self._step(batch) or has_moved
        return has_moved

    def _step(self, batch: BatchView) -> bool:
        """What is wrong with one batch keeps no other one waiting."""
        try:
            has_moved = self._work(batch)
        except NotHeld:
            return False
        except Exception as error:
            self._drop(batch.id)
            self._tell(batch, str(error) if isinstance(error, GristmillError) else place_of(error))
            return False
        self._told.pop(batch.id, None)
        return has_moved

    def _work(self, batch: BatchView) -> bool:
        if batch.state is BatchState.VALIDATING:
            return self._validate(batch)
        if batch.counts.open:
            ended = self._collect(batch)  # needs no storage
            return self._feeder.step(batch, self.id, LEASE_S) or ended
        return self._finish(batch)

    # ── validating ───────────────────────────────────────────────────────────────────────────

    def _validate(self, batch: BatchView) -> bool:
        if batch.input_file_id is None:
            name = batch.input_name
            return self._refuse(batch, f"Cannot find file {name}, or you do not have access to it.")
        if self._scan is None:
            rows = self._feeder.rows_of(batch)
            most = self._settings.job_batches.max_requests
            scan = Scan(batch.door, Url(batch.url), self._knows, most, rows)
            self._scan = (batch.id, scan)
        scanned, scan = self._scan
        if scanned != batch.id:
            return False  # its turn comes
        try:
            is_read = scan.go_on()
        except ObjectMissing:
            if not batch.is_over:
                raise  # it may come back
            return self._refuse(batch, f"The file {batch.input_name} cannot be read any more.")
        with self._database.begin() as connection:
            now = batch_work.held(connection, self.id, LEASE_S, batch.id)
            if is_read and scan.errors:
                batch_work.refuse(connection, now, scan.errors, scan.model)
            elif is_read:
                batch_work.begin(connection, now, scan.total, scan.model)
        if is_read:
            self._scan = None
            what = "was refused" if scan.errors else "begins"
            extra = {"action": "batch_read", "batch_id": batch.id, "lines": scan.total}
            log.info("A batch was read and %s.", what, extra=extra)
        return True

    def _refuse(self, batch: BatchView, sentence: str) -> bool:
        error = LineError("invalid_request", sentence, None, "file_id")
        with self._database.begin() as connection:
            now = batch_work.held(connection, self.id, LEASE_S, batch.id)
            batch_work.refuse(connection, now, [error], None)
        return True

    def _knows(self, url: Url, model: str) -> bool:
        try:
            self._settings.model_name(url.kind, model)
        except ModelNotFound:
            return False
        return True

    # ── in progress ──────────────────────────────────────────────────────────────────────────

    def _collect(self, batch: BatchView) -> bool:
        cancelled = self._cancel_jobs(batch) if batch.state is BatchState.CANCELLING else 0
        is_due = self._now_s() >= self._look_for_lost_at.get(batch.id, 0.0)
        with self._database.begin() as connection:
            now = batch_work.held(connection, self.id, LEASE_S, batch.id)
            ended = batch_work.collect(connection, now, COLLECTED)
            if is_due and not ended:
                self._look_for_lost_at[batch.id] = self._now_s() + LOST_EVERY_S
                ended = batch_work.give_up_lost(connection, now, COLLECTED)
            if ended:
                now = batch_work.held(connection, self.id, LEASE_S, batch.id)
                output_file.begin_files(connection, now)
        return bool(ended or cancelled)

    def _cancel_jobs(self, batch: BatchView) -> int:
        """Cancel a page of its jobs: those that wait at once, those that run by their workers."""
        with self._database.begin() as connection:
            ids = batch_work.open_jobs(connection, batch, CANCELLED)
            if ids:
                cancellation.cancel_free(connection, ids, tenant=batch.tenant)
                told = cancellation.who_runs(connection, ids)
        if ids:
            self._own_submitter.sender.tell_cancelled(told)
        return len(ids)

    # ── its end ──────────────────────────────────────────────────────────────────────────────

    def _finish(self, batch: BatchView) -> bool:
        if self._writing is None:
            self._writing = self._begin_writing(batch)
        if self._writing.batch.id != batch.id:
            return False  # its turn comes
        is_whole = self._writing.step()
        with self._database.begin() as connection:
            now = batch_work.held(connection, self.id, LEASE_S, batch.id)
            if is_whole:
                self._writing.settle(connection)
                state = batch_work.end(connection, now)
        if is_whole:
            self._writing = None
            extra = {"action": "batch_ended", "batch_id": batch.id, "state": state}
            log.info("A batch has ended.", extra=extra)
        return True

    def _begin_writing(self, batch: BatchView) -> Writing:
        with self._database.begin() as connection:
            now = batch_work.held(connection, self.id, LEASE_S, batch.id)
            batch_work.finalize(connection, now)
            output_file.begin_files(connection, now)
            now = batch_work.held(connection, self.id, LEASE_S, batch.id)
        return Writing(self._database, self._objects, now)

    # ── what it has ──────────────────────────────────────────────────────────────────────────

    @property
    def _feeder(self) -> Feed:
        if self._feed is None:
            self._feed = Feed(self._settings, self._database, self._objects, self._own_submitter)
        return self._feed

    @property
    def _own_submitter(self) -> Submitter:
        if self._submitter is None:
            catalog = load_catalog(self._settings)
            self._submitter = Submitter(self._settings, self._database, self._publisher, catalog)
        return self._submitter

    def _forget_others(self, held: set[UUID]) -> None:
        if self._scan is not None and self._scan[0] not in held:
            self._scan = None
        if self._writing is not None and self._writing.batch.id not in held:
            self._writing = None
        for batch_id in self._told.keys() - held:
            del self._told[batch_id]
        for batch_id in self._look_for_lost_at.keys() - held:
            del self._look_for_lost_at[batch_id]
        if self._feed is not None:
            self._feed.forget_others(held)

    def _drop(self, batch_id: UUID) -> None:
        """What was in hand of it may be half: it is begun anew."""
        if self._scan is not None and self._scan[0] == batch_id:
            self._scan = None
        if self._writing is not None and self._writing.batch.id == batch_id:
            self._writing = None

    def _tell(self, batch: BatchView, why: str) -> None:
        """Once, however often it is tried."""
        if self._told.get(batch.id) != why:
            extra = {"action": "batch_waits", "batch_id": batch.id}
            log.warning("A batch cannot go on now: %s", why, extra=extra)
        self._told[batch.id] = why

    def _release(self) -> None:
        try:
            with self._database.begin() as connection:
                batch_work.release(connection, self.id)
        except GristmillError:
            pass  # the lease will be over
