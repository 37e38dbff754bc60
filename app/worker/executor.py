"""What runs: the conversation with the engine process, and who is to blame when it is lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Final

from app.engines.hardware import Hardware
from app.errors import EngineError, OutOfMemory
from app.worker.dispatcher import Dispatcher, Room
from app.worker.engine.host import EngineHost
from app.worker.engine.pipe import WorkerEnd
from app.worker.engine.wire import Broken, DidNotFit, Ready, Recalled, Stepped
from app.worker.running import Running
from app.worker.streams import TokenStreams
from app.worker.suspects import verdict
from app.worker.work import EXPIRED, TIMED_OUT, Ending, Job

log = logging.getLogger(__name__)

LIMITS: Final = (EXPIRED, TIMED_OUT)
MAX_DEATHS: Final = 3  #: of engine processes in a row that had nothing to run


class Executor:
    """Owns the engine process and the jobs inside it. What it drops goes back to the dispatcher."""

    def __init__(
        self,
        models: tuple[str, ...],
        host: EngineHost,
        dispatcher: Dispatcher,
        streams: TokenStreams,
        now_ns: Callable[[], int],
    ) -> None:
        self.loaded = threading.Event()  #: the models are, or never will be
        self._models = models
        self._now_ns = now_ns
        self._host = host
        self._dispatcher = dispatcher
        self._streams = streams
        self._running = Running()
        self._deaths = 0  #: of engine processes since the last answer
        self._starts_again = True
        self.hardware = Hardware()  #: that the engines run on, once they are loaded
        self._kernels: dict[str, str] = {}  #: what computes, by model

    @property
    def connection(self) -> WorkerEnd | None:
        return self._host.connection

    @property
    def is_busy(self) -> bool:
        return self._host.busy

    def facts(self) -> dict[str, object]:
        return {
            "pid": self._host.pid,
            "ready": self._host.ready,
            "slow": self._host.is_slow,
            "kernels": self._kernels,
            "device": self.hardware.name,
            "device_index": self.hardware.index,
            "versions": self.hardware.versions,
        }

    def rooms(self) -> dict[str, Room]:
        """By model; none while the models are not loaded."""
        if not self._host.ready:
            return {}
        return {
            model: Room(
                self._host.free_rows(model),
                self._running.num_rows(model),
                self._host.joins(model),
                self._host.max_rows(model),
                self._host.has_waiting(model),
            )
            for model in self._models
        }

    def start(self) -> None:
        self._host.start()

    def start_no_more(self) -> None:
        """The worker is to end: what has not begun comes back, and an engine process that is lost
        is not replaced."""
        self._starts_again = False
        for model in self._models:
            if self._host.ready and self._host.has_waiting(model):
                self._host.recall(model)

    def kill(self) -> None:
        """End the engine process; what was inside has wasted its time."""
        try:
            self._host.kill()
        except EngineError as error:
            log.error("%s", error, extra={"action": "engine_left"})
        self._running.leave_waiting()
        self._running.leave_dead(self._host.hours.spent_ns)

    def run(self, jobs: list[Job]) -> None:
        """Hand claimed jobs of one batch over."""
        batch = jobs[0].claimed_run.batch
        waits = self._host.must_wait(batch.model)
        sequences = self._running.enter(jobs, waits=waits)
        self._streams.enter(jobs, sequences)
        self._host.admit(batch.model, str(batch.id), sequences)
        if not waits:
            self._begin(jobs)

    def _begin(self, jobs: list[Job]) -> None:
        for job in jobs:
            run = job.claimed_run
            run.began_ns = run.began_ns or self._now_ns()
            job.ticket.started()
            self._streams.begin(job)

    def cut_short(self, job: Job, ending: Ending) -> None:
        """End a claimed job early; the engine answers with what it has, or gives it back."""
        run, ended_before = job.claimed_run, ending in LIMITS and job.ended_in_time
        if run.ending is None and not ended_before:
            run.ending = ending
            if self._running.is_waiting(job):
                self._host.recall(job.model)
            else:
                self._cancel(job)

    def _cancel(self, job: Job) -> None:
        for sequence_id in self._running.sequence_ids(job):
            self._host.cancel(job.model, sequence_id)

    def hear(self, over: list[Job]) -> None:
        """Take what the engine process says; adds to `over` the jobs that have all their answers.

        Raises `EngineError` if there is no use in going on.
        """
        self._host.flush()
        for event in self._host.events():
            match event:
                case Ready(engines=engines, load_ns=load_ns, hardware=hardware):
                    self.hardware = hardware
                    self._kernels = {name: engine.kernels for name, engine in engines.items()}
                    which = "; ".join(f"{name}: {each}" for name, each in self._kernels.items())
                    log.info("The models were loaded in %.1f s (%s).", load_ns / 1e9, which)
                    self.loaded.set()
                case Stepped():
                    over += self._answered(event)
                case DidNotFit(model, dropped, took_ns):
                    self._halve(dropped, took_ns)
                    self._begin(self._running.begin(model))
                case Recalled(model, sequence_ids):
                    over += self._take_back(model, sequence_ids)
                case Broken() as broken:
                    self._lose(broken)
        if self._host.is_stuck():
            self._lose(Broken("it made no progress in time", was_stuck=True))

    def _answered(self, stepped: Stepped) -> list[Job]:
        self._deaths = 0
        answered = self._running.answer(stepped)
        for job in answered:
            self._dispatcher.note_ran(job)
            if job.claimed_run.ending in LIMITS and job.ended_in_time:
                job.claimed_run.ending = None  # told later than it came
        for batch in self._running.ended(answered):
            self._dispatcher.note_batch(batch)
        self._begin(self._running.begin(stepped.model))
        return answered

    def _take_back(self, model: str, sequence_ids: Iterable[int]) -> list[Job]:
        """What had not begun waits here again; returns those that are over without it."""
        recalled = self._running.leave(sequence_ids)
        self._dispatcher.add_claimed([job for job in recalled if job.claimed_run.ending is None])
        for job in self._running.jobs(model):
            if job.claimed_run.ending is not None:  # it has begun all the same
                self._cancel(job)
        return [job for job in recalled if job.claimed_run.ending is not None]

    def _halve(self, sequence_ids: Iterable[int], took_ns: int) -> None:
        """The device ran out of memory: smaller batches follow, and nobody is charged."""
        dropped, solo = self._running.leave(sequence_ids, took_ns), self._running.solo
        self._dispatcher.note_overflow(dropped)
        if dropped == [solo]:
            run = dropped[0].claimed_run
            run.ending = run.ending or Ending.failed(OutOfMemory())
        self._dispatcher.put_back(dropped)

    def _lose(self, broken: Broken) -> None:
        """The engine process died or hangs. Find the guilty by halves, and charge nobody else."""
        self._host.kill()
        if broken.will_not_load or not self.loaded.is_set():
            raise EngineError(f"The models cannot be loaded: {broken.reason}.")
        self._dispatcher.add_claimed(self._running.leave_waiting())
        suspects, solo = self._running.leave_dead(self._host.hours.spent_ns), self._running.solo
        log.error(
            "The engine process is lost: %s. It held %d jobs.",
            broken.reason,
            len(suspects),
            extra={"action": "engine_lost"},
        )
        self._deaths = 0 if suspects else self._deaths + 1
        if self._deaths == MAX_DEATHS:
            raise EngineError(f"{MAX_DEATHS} engine processes died with nothing to run.")
        if broken.was_killed:
            self._dispatcher.note_overflow(suspects)
        for job in suspects:
            job.claimed_run.deaths += 1
        if suspects == [solo]:
            run = suspects[0].claimed_run
            run.ending = run.ending or verdict(run, broken)
        self._dispatcher.put_back(suspects)
        if self._starts_again:
            self._host.start()
