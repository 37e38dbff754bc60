"""The runner's thread: it sleeps until somebody has something for the runner, then turns it.

It is not the hub: Celery's hub stands still while it reconnects and while it shuts down, and in
those windows leases, commits and running work must go on.
"""

from __future__ import annotations

import logging
import math
import os
import select
import threading
import traceback
from collections.abc import Callable

from app.errors import EngineError, GristmillError
from app.threads import place_of
from app.worker.commands import Command
from app.worker.runner import Runner

log = logging.getLogger(__name__)


class RunnerThread(threading.Thread):
    """Runs jobs until it is drained. `post` may be called from any thread and signal handler."""

    def __init__(self, runner: Runner, on_end: Callable[[], object]) -> None:
        """`on_end` is called when the thread has ended, with `failure` set if it had to."""
        super().__init__(name="runner", daemon=True)
        self.ready = runner.ready
        self.failure: GristmillError | None = None
        self._runner = runner
        self._on_end = on_end
        self._wake_out, self._wake_in = os.pipe()
        os.set_blocking(self._wake_in, False)

    @property
    def turned_ns(self) -> int:
        """When the runner last went round."""
        return self._runner.turned_ns

    @property
    def waits_for_database(self) -> bool:
        """Whether it is in a statement now."""
        return self._runner.waits_for_database

    def post(self, command: Command) -> None:
        self.add(command)
        self.wake()

    def add(self, command: Command) -> None:
        """For the next turn, which `wake` asks for: once for many."""
        self._runner.post(command)

    def fail(self, error: GristmillError) -> None:
        """End the runner because of something that another thread found out."""
        self._runner.fail(error)
        self.wake()

    def facts(self) -> dict[str, object]:
        return self._runner.facts()

    def run(self) -> None:
        try:
            self._runner.start()
            while not self._runner.is_drained:
                self._sleep()
                self._runner.turn()
        except GristmillError as error:
            self.failure = error
        except Exception as error:
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("The runner failed.\n%s", frames, extra={"action": "runner_failed"})
            self.failure = EngineError(f"The runner failed ({place_of(error)}).")
        finally:
            try:
                self._runner.stop()
            finally:
                self._on_end()

    def _sleep(self) -> None:
        poll = select.poll()
        poll.register(self._wake_out, select.POLLIN)
        if (engine := self._runner.connection) is not None:
            poll.register(engine, select.POLLIN | (engine.wants_write and select.POLLOUT))
        woken_by = poll.poll(math.ceil(self._runner.next_turn_s() * 1_000))
        if any(fd == self._wake_out for fd, _ in woken_by):
            os.read(self._wake_out, 65_536)

    def wake(self) -> None:
        try:
            os.write(self._wake_in, b"!")
        except BlockingIOError:
            pass  # a full pipe wakes as well
