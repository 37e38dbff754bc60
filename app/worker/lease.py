"""The lease keeper: renews this worker's lease, and brings news of its attempts.

Two threads: one renews it every `heartbeat_s`, over a connection of its own where the runner's is
in use for long, so that a commit that hangs does not cost the lease; one hears of cancels so that
they act at once. The lease is renewed only while the runner turns: a worker that is stuck must lose
its jobs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final
from uuid import UUID

from app.errors import LeaseLost, Unavailable
from app.store import workers
from app.store.database import Database
from app.threads import Background
from app.worker.account import Account
from app.worker.thread import RunnerThread
from app.worker.work import LeaseNews

log = logging.getLogger(__name__)

RETRY_S: Final = 1.0
LATE_S: Final = 3.0
"""A heartbeat that is late by so much hangs."""


class LeaseKeeper:
    """Keeps one worker's lease from its registration until it is stopped."""

    def __init__(
        self,
        *,
        worker: workers.NewWorker,
        database: Database,
        hear_cancels: Callable[[threading.Event], Iterator[frozenset[UUID] | None]],
        runner: RunnerThread,
        account: Account,
        lease_s: float,
        heartbeat_s: float,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._worker = worker
        self._database = database
        self._hear_cancels = hear_cancels
        self._runner = runner
        self._account = account
        self._lease_s = lease_s
        self._heartbeat_s = heartbeat_s
        self._now_ns = now_ns
        self._renewed_ns = now_ns()
        self._failed = False  #: the last heartbeat did
        self._stopping = threading.Event()
        self._threads = [
            Background("lease", self._keep, self._stopping),
            Background("cancels", self._listen, self._stopping),
        ]

    def start(self, facts: Mapping[str, Any]) -> None:
        """Register the worker and what computes in it, as its runner tells when the models are
        loaded; raises `Unavailable`, and `SchemaError`."""
        told = {name: facts[name] for name in ("kernels", "versions")}
        self._worker = replace(
            self._worker,
            engine=self._worker.engine | told,
            device=facts["device"],
            device_index=facts["device_index"],
        )
        self.register()
        for thread in self._threads:
            thread.start()

    def register(self) -> None:
        with self._database.begin() as connection:
            workers.register_worker(connection, self._worker, self._lease_s)

    def stop(self) -> None:
        """Give the lease back: whatever this worker still has is free at once."""
        self._stopping.set()
        self._account.close(is_last=True)
        try:
            self._account.write(self._database)
            with self._database.begin() as connection:
                workers.stop_worker(connection, self._worker.id)
        except Unavailable as error:
            log.warning("The lease runs out by itself: %s", error)

    def _keep(self) -> None:
        while not self._stopping.wait(RETRY_S if self._failed else self._heartbeat_s):
            self.beat()

    @property
    def trouble(self) -> str | None:
        """Why the lease is not being renewed; None if it is."""
        late_s = (self._now_ns() - self._renewed_ns) / 1e9 - self._heartbeat_s
        return "Postgres does not answer." if self._failed or late_s > LATE_S else None

    def database_answers(self) -> bool:
        try:
            self._database.check_schema()
        except Unavailable:
            return False
        return True

    def beat(self) -> None:
        """Renew the lease if the runner deserves it."""
        still_s = (self._now_ns() - self._runner.turned_ns) / 1e9
        if still_s > self._lease_s / 2:
            log.error(
                "The runner has stood still for %.0f s; the lease is not renewed.",
                still_s,
                extra={"action": "lease_withheld"},
            )
            return
        try:
            self._renew()
            self._failed = False
        except Unavailable as error:
            self._failed = True
            log.warning("No heartbeat: %s", error, extra={"action": "heartbeat_failed"})
        except LeaseLost as error:
            if not self._stopping.is_set():
                self._runner.fail(error)

    def _renew(self) -> None:
        asked_ns = self._now_ns()
        with self._database.begin() as connection:
            beat = workers.heartbeat(connection, self._worker.id, self._lease_s)
        self._renewed_ns = self._now_ns()
        news = LeaseNews(
            asked_ns=asked_ns,
            held=beat.held,
            cancelled=beat.cancel_requested,
            expired=beat.past_deadline,
        )
        try:
            self._account.close()
            self._account.write(self._database)
        finally:  # last, for the runner asks Postgres then, and one connection is kept for both
            self._runner.post(news)

    def _listen(self) -> None:
        """Cancels act at once; one that may have been missed comes with a heartbeat."""
        for job_ids in self._hear_cancels(self._stopping):
            if job_ids is None:
                self.beat()
            else:
                self.hear_cancel(job_ids)

    def hear_cancel(self, job_ids: frozenset[UUID]) -> None:
        """Running jobs were cancelled; whose they are, the runner knows."""
        self._runner.post(LeaseNews(asked_ns=0, held=None, cancelled_jobs=job_ids))
