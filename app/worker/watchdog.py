"""The watchdog: ends a worker that has room, and does not receive what waits for it in Redis.

After a fault of Redis a Celery worker may stay alive, answer its own timers and never consume
again. Nothing inside it notices; so this looks at the queues over a connection of its own, and
ends the process, for its supervisor to start it anew.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Final

from app.errors import Unavailable
from app.worker.commands import Drain
from app.worker.lease import LeaseKeeper
from app.worker.thread import RunnerThread

log = logging.getLogger(__name__)

LOOKS: Final = 10
"""Times that it looks before it acts: each must find the same."""
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
    ) -> None:
        """`backlog` counts the messages in the queues that this worker consumes; it may raise
        `Unavailable`."""
        self._backlog = backlog
        self._runner = runner
        self._lease = lease
        self._pause_s = stall_timeout_s / LOOKS
        self._num_received: object = None
        self._times_stalled = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()

    def _watch(self) -> None:
        while not self._stopping.wait(self._pause_s):
            if self.has_stalled():
                self._end()

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

    def _end(self) -> None:
        """The main thread may hang, so the process ends without it."""
        log.critical(
            "The worker ends: messages wait in Redis and it has received none for %.0f s.",
            self._pause_s * LOOKS,
            extra={"action": "stalled"},
        )
        self._runner.post(Drain(time.monotonic_ns()))
        self._runner.join(GIVE_BACK_S)
        self._lease.stop()
        logging.shutdown()
        os._exit(os.EX_SOFTWARE)
