"""A ticket ties a job to the Celery message that brought it, from `EnginePool.take` to the ack.

Celery is told at most one start and exactly one ending, and always from the runner thread. A
detached ticket tells nothing: Celery itself has ended the request (a revoke, a cold shutdown).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

from billiard.einfo import ExceptionInfo
from celery.exceptions import Ignore

from app.worker.pool.arrivals import Arrival

log = logging.getLogger(__name__)


class JobFailed(Exception):
    """What Celery and Flower show of a failed job: its error code and sentence."""


class Ticket:
    """One message that waits for its ending. `slot` stands for a process id in Celery's eyes."""

    __slots__ = (
        "__weakref__",
        "_accept",
        "_end",
        "_is_started",
        "_revoke",
        "_time_out",
        "arrival",
        "detached",
        "slot",
        "time_limit_s",
    )

    def __init__(
        self,
        slot: int,
        arrival: Arrival,
        *,
        accept: Callable[[int, float], object],
        end: Callable[[tuple[int, Any, float]], object],
        time_out: Callable[[bool, float], object],
        time_limit_s: float | None,
        revoke: Callable[[UUID], object],
    ) -> None:
        self.slot = slot
        self.arrival = arrival
        self.time_limit_s = time_limit_s
        self.detached = False
        self._is_started = False
        self._accept, self._end, self._time_out = accept, end, time_out
        self._revoke = revoke

    @property
    def job_id(self) -> UUID:
        return self.arrival.job_id

    def terminate(self, signum: int) -> None:
        """Celery terminates this request. If it has not started, it waits for us to say more."""
        if self._is_started:
            self.detached = True
        else:
            self._revoke(self.job_id)

    def started(self) -> None:
        """The job's batch begins: Flower counts its runtime and Celery its time limit from here."""
        if not self._is_started:  # a job that runs again after a crash has started once
            self._is_started = True
            self._tell(lambda: self._accept(self.slot, time.monotonic()))

    def succeeded(self, summary: Callable[[], str], runtime_s: float) -> None:
        """Ack, and show what `summary` says as the result, if anybody wants to see it."""
        self._finish(lambda: self._end((0, summary, runtime_s)))

    def failed(self, code: str, message: str, runtime_s: float) -> None:
        """Ack, and show the error."""
        try:
            raise JobFailed(f"{code}: {message}")
        except JobFailed as error:
            info = ExceptionInfo()
            # Billiard would show its own wrapper and where in this file it was raised.
            info.exception, info.traceback = error, str(error)
        self._finish(lambda: self._end((1, info, runtime_s)))

    def timed_out(self) -> None:
        """Ack, and show that the message's time limit ended the job."""
        self._finish(lambda: self._time_out(False, self.time_limit_s or 0.0))

    def dropped(self) -> None:
        """Ack without an ending: the row is somebody else's, or final, or not due yet."""
        try:
            raise Ignore
        except Ignore:
            info = ExceptionInfo()
        self._finish(lambda: self._end((1, info, 0.0)))

    def _finish(self, call: Callable[[], object]) -> None:
        self._tell(call)
        self.detached = True

    def _tell(self, call: Callable[[], object]) -> None:
        """An exception must not reach the runner: the row is right whatever Celery thinks."""
        if self.detached:
            return
        try:
            call()
        except Exception:
            log.exception("Celery did not take the news of a job.", extra={"job_id": self.job_id})
