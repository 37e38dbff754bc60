"""EnginePool: a Celery pool that keeps each message's own life and runs the work in batches.

Celery's hub thread calls in here and must never wait; all it does is post to the runner. Signal
handlers run on the same thread between any two bytecodes, so no lock is held anywhere. Nothing may
escape from a call: the hub would take it for a broken broker connection.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import signal
import time
from contextlib import suppress
from typing import Any, Final
from uuid import UUID

from celery import signals
from celery.concurrency.base import BasePool
from celery.exceptions import WorkerShutdown, WorkerTerminate
from celery.worker import state as celery_state

from app.broker.client import check_kind
from app.broker.message import TASKS
from app.broker.tally import Tally
from app.collector import keep_what_is_there
from app.config.settings import Settings
from app.errors import GristmillError
from app.jobs import Kind, job_id_of
from app.worker.assembly import Assembly, assemble
from app.worker.commands import Drain, Flush, Nameless, Revoked
from app.worker.pool import control as _control  # noqa: F401  its commands are there once imported
from app.worker.pool.arrivals import Refusal
from app.worker.pool.request import Request
from app.worker.pool.ticket import Ticket

log = logging.getLogger(__name__)

FIRST_SLOT: Final = 1_000_000
STOP_S: Final = 5.0
TROUBLE_LASTS_S: Final = 30.0
"""The consumer tries again every few seconds, and tells each time; silence is another trouble."""


class EnginePool(BasePool):  # type: ignore[misc]
    """One per worker; see the custom pool's contract in celery.concurrency.base."""

    signal_safe = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._slots: Final = itertools.count(FIRST_SLOT)
        self._hub: Any = None
        self._has_added = False  #: messages, since the runner was woken
        self._times_asked = 0  #: to shut down
        self._broker_trouble_at = -math.inf  #: by the monotonic clock
        self._wake_out, self._wake_in = os.pipe()  # ends the hub's wait; open as long as we live
        os.set_blocking(self._wake_in, False)
        self._has_runner_ended = False
        self._hangup = signal.getsignal(signal.SIGHUP)  # before Celery takes it
        self._assembly: Assembly | None = None

    @property
    def _parts(self) -> Assembly:
        assert self._assembly is not None, "the pool was not started"
        return self._assembly

    @property
    def tally(self) -> Tally:
        """Of what jobs used, which each connection goes on telling."""
        return self._parts.tally

    # ── start ────────────────────────────────────────────────────────────────────────────────

    def on_start(self) -> None:
        """Load the models before the first message is taken: an unready worker takes no work."""
        settings: Settings = self.app.settings
        try:
            check_kind(settings)
            self._assembly = assemble(settings, self._consumed, on_end=self._runner_ended)
            self._assembly.start()
        except GristmillError as error:
            log.critical("The worker cannot start: %s", error)
            raise SystemExit(1) from None
        keep_what_is_there()
        self._set_hangup()
        # The hub's wait goes on after a signal handler, which may have told the worker to end.
        signal.set_wakeup_fd(self._wake_in, warn_on_full_buffer=False)
        signals.task_revoked.connect(self._revoked)
        signals.worker_shutting_down.connect(self._asked_to_stop)
        log.info("The worker is ready.", extra={"action": "worker_ready"})

    def _set_hangup(self) -> None:
        """A terminal that goes ends the worker in order, or, under nohup, does nothing.

        Celery would run its command line again, and not find the app.
        """
        ignored = self._hangup is signal.SIG_IGN
        signal.signal(signal.SIGHUP, self._hangup if ignored else signal.getsignal(signal.SIGTERM))

    def _consumed(self) -> tuple[str, ...]:
        """The queues that messages are taken from; none while the broker is known to be away."""
        if time.monotonic() - self._broker_trouble_at < TROUBLE_LASTS_S:
            return ()
        return tuple(self.app.amqp.queues.consume_from)

    def note_broker_trouble(self) -> None:
        """The consumer cannot reach the broker, or is refused, and will try again."""
        self._broker_trouble_at = time.monotonic()

    def register_with_event_loop(self, hub: Any) -> None:
        self._hub = hub
        hub.add_reader(self._wake_out, os.read, self._wake_out, 65_536)

    def wake_hub(self) -> None:
        with suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._wake_in, b"!")

    def _runner_ended(self) -> None:
        """Without its runner the worker can do nothing: end it, so that it is started again."""
        if self._assembly is not None and self._assembly.runner.failure is not None:
            log.critical("The worker ends: %s", self._assembly.runner.failure)
            # A warm stop: nothing runs any more, and Celery would exit with 0 after a cold one.
            celery_state.should_stop = os.EX_SOFTWARE
        self._has_runner_ended = True
        self.wake_hub()

    # ── messages ─────────────────────────────────────────────────────────────────────────────

    def take(self, request: Request) -> Ticket:
        """Hand one job to the runner, which holds its ticket for as long as it matters."""
        ticket = Ticket(
            next(self._slots),
            request.arrival,
            accept=request.on_accepted,
            end=request.on_success,
            time_out=request.on_timeout,
            time_limit_s=request.time_limits[0] or request.task.time_limit,
            revoke=self._revoke,
        )
        self._parts.runner.add(ticket)
        self._has_added = True
        return ticket

    def wake_runner(self) -> None:
        """Once for all that came in a turn of the hub."""
        if self._has_added:
            self._has_added = False
            self._parts.runner.wake()

    def refuse(self, refusal: Refusal) -> None:
        """Record why a message cannot run; it is acknowledged once that is written."""
        self._parts.runner.post(refusal)

    def note_nameless(self) -> None:
        """A message that belongs to no job was dropped; it shows that this worker receives."""
        self._parts.runner.post(Nameless())

    def terminate_job(self, pid: int, signum: int | None = None) -> None:
        """Celery has ended this request by itself, so it is told nothing more about it.

        What becomes of the job is decided elsewhere: a revoke is announced by a signal of its own,
        a cold shutdown stops the pool.
        """
        for request in list(celery_state.requests.values()):
            if request.worker_pid == pid and (ticket := request._apply_result()):
                ticket.detached = True

    def _revoked(self, request: Any = None, **_: Any) -> None:
        """Celery's signal; it comes after terminate_job, and before a job is even received."""
        kind = TASKS.get(request.get("task"), Kind.GENERATE)
        self._parts.runner.post(Revoked(job_id_of(request.id), kind))

    def _revoke(self, job_id: UUID) -> None:
        self._parts.runner.post(Revoked(job_id))

    def flush(self) -> None:
        """The broker connection is lost: unacknowledged messages will come again."""
        self._parts.runner.post(Flush())

    # ── end ──────────────────────────────────────────────────────────────────────────────────

    def _asked_to_stop(self, **_: Any) -> None:
        """Celery's signal, in a signal handler. Whoever asks a second time wants it at once."""
        self._times_asked += 1
        if self._times_asked > 1:
            self._parts.runner.post(Drain(time.monotonic_ns()))

    def on_close(self) -> None:
        """Warm shutdown: let running work finish within the grace period, and its acks go out.

        The consumer's channel is still open here, so the hub is turned by hand.
        """
        parts = self._assembly
        if parts is None:
            return
        grace_s = self.app.settings.worker.grace_s if self._times_asked < 2 else 0.0
        parts.runner.post(Drain(time.monotonic_ns() + int(grace_s * 1e9)))
        while parts.runner.is_alive() and not self._has_runner_ended:
            self._turn_hub()
        self.wake_hub()
        self._turn_hub()

    def _turn_hub(self) -> None:
        try:
            self._hub.run_once()
        except (WorkerShutdown, WorkerTerminate):
            raise
        except Exception as error:
            # The broker may be gone by now; what is not acknowledged is delivered again.
            log.debug("The hub stumbled during the shutdown (%s).", type(error).__name__)
            time.sleep(0.05)

    def on_stop(self) -> None:
        """Give back at once what still runs; also called in a signal handler (cold shutdown)."""
        if self._assembly is None:
            return
        self._assembly.runner.post(Drain(time.monotonic_ns()))
        self._assembly.stop(STOP_S)

    def on_terminate(self) -> None:
        self.on_stop()

    def readiness(self) -> dict[str, Any]:
        """Whether this worker makes progress, and what keeps it from it."""
        trouble = self._assembly.trouble() if self._assembly else "It has not started."
        return {"ready": trouble is None, "trouble": trouble}

    def _get_info(self) -> dict[str, Any]:
        return {**super()._get_info(), **(self._assembly.facts() if self._assembly else {})}
