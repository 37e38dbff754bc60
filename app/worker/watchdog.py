"""The watchdog: ends a worker that is alive and of no use, for its supervisor to start it anew.

After a fault of Redis a Celery worker may answer its own timers and never consume again; nothing
inside it notices, so this looks at the queues over a connection of its own. And whatever the runner
may wait for that never comes, a runner that stands still for longer than the lease has lost its
jobs to others already.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from app.errors import Unavailable
from app.threads import Background, end_process
from app.worker.commands import Drain
from app.worker.lease import LeaseKeeper
from app.worker.thread import RunnerThread

log = logging.getLogger(__name__)

LOOKS: Final = 10
"""Times that it looks at the queues or the runner before it acts: each must find the same."""
GIVE_BACK_S: Final = 5.0


class Watchdog:
    """Watches from its start until it is stopped."""

    def __init__(
        self,
        *,
        backlog: Callable[[], int],
        runner: RunnerThread,
        lease: LeaseKeeper,
        stall_timeout_s: float,
        lease_s: float,
    ) -> None:
        """`backlog` counts the messages in the queues that this worker consumes; it may raise
        `Unavailable`."""
        self._backlog = backlog
        self._runner = runner
        self._lease = lease
        self._pause_s = stall_timeout_s / LOOKS
        self._look_s = lease_s / LOOKS
        self._num_received: object = None
        self._times_stalled = 0
        self._turned_ns = 0
        self._times_still = 0
        self._stopping = threading.Event()
        self._threads = (
            Background("watchdog", self._watch_queues, self._stopping),
            Background("standstill", self._watch_runner, self._stopping),
        )

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()

    # ── a runner that stands still ───────────────────────────────────────────────────────────

    def _watch_runner(self) -> None:
        while not self._stopping.wait(self._look_s):
            if self.stands_still():
                end_process("its runner has stood still for longer than its lease.")

    def stands_still(self) -> bool:
        """Look once; whether the runner has stood still for a lease's time of looks.

        Looks are counted and not the time: a process that was frozen as a whole is not to blame.
        One that waits for Postgres is not either, as long as nobody gets an answer from there.
        """
        before, self._turned_ns = self._turned_ns, self._runner.turned_ns
        self._times_still = self._times_still + 1 if before == self._turned_ns else 0
        if self._times_still <= LOOKS:
            return False
        return not self._runner.waits_for_database or self._lease.database_answers()

    # ── a worker that does not consume ───────────────────────────────────────────────────────

    def _watch_queues(self) -> None:
        while not self._stopping.wait(self._pause_s):
            if self.has_stalled():
                self._give_back()
                waited_s = self._pause_s * LOOKS
                end_process(f"messages wait in Redis and it has received none for {waited_s:.0f} s")

    def has_stalled(self) -> bool:
        """Look once; whether every one of the last `LOOKS` found work and none taken."""
        stalled = self._is_idle() and self._sees_work()
        self._times_stalled = self._times_stalled + 1 if stalled else 0
        return self._times_stalled >= LOOKS

    def _is_idle(self) -> bool:
        """Whether the worker holds nothing, and has received nothing since the last look."""
        facts = self._runner.facts()
        before, self._num_received = self._num_received, facts["received"]
        return not facts["held"] and before == facts["received"]

    def _sees_work(self) -> bool:
        try:
            return self._backlog() > 0
        except Unavailable:
            return False  # Celery waits for Redis as well, and will have it again

    def _give_back(self) -> None:
        """The main thread may hang, so the process ends without it."""
        self._runner.post(Drain(time.monotonic_ns()))
        self._runner.join(GIVE_BACK_S)
        self._lease.stop()
