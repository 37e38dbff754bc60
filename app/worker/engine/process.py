"""The engine process: one child per device that owns the models and runs them.

It is started by `app.worker.engine.host` with a socket to talk over and a page of shared memory to
show progress in, and lives no longer than its parent: when the socket closes it exits at once,
whatever it is doing. It never sees Celery, Redis or Postgres.
"""

from __future__ import annotations

import mmap
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Sequence as Seq
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

from app.engines import registry
from app.engines.base import Engine, StepStats
from app.errors import GristmillError, OutOfMemory
from app.worker.engine.wire import (
    PROGRESS,
    Admit,
    Broken,
    Cancel,
    DidNotFit,
    EngineFacts,
    Load,
    Ready,
    Stepped,
)

FAILED_TO_LOAD: Final = 3  #: exit status; a restart would not help
FADING: Final = 256
"""The slowest step is forgotten by one part in so many with every step that follows."""
ENGINE_FAILED: Final = 4  #: exit status; the device's state is not to be trusted


KILLED_FIRST: Final = 500
"""Of a thousand: as if half of the host's memory were its own, besides what is."""


class EngineProcess:
    """Runs admitted sequences to their end and says so, until its parent goes away."""

    def __init__(self, parent: Connection, progress: mmap.mmap) -> None:
        self._parent = parent
        self._progress = progress
        self._steps = 0
        self._since_ns = 0  #: when the step that runs began
        self._slowest_ns = 0
        self._inbox: queue.SimpleQueue[Admit] = queue.SimpleQueue()
        self._engines: dict[str, Engine] = {}

    def run(self) -> None:
        self._load(self._parent.recv())
        threading.Thread(target=self._listen, daemon=True, name="listen").start()
        while True:
            self._admit()
            for model, engine in self._engines.items():
                if engine.has_work:
                    self._step(model, engine)

    def _load(self, command: Load) -> None:
        began = time.monotonic_ns()
        for model in command.models:
            self._engines[model.name] = registry.create(
                model.settings.engine,
                model.folder,
                model.settings,
                device=command.device,
                threads=command.threads,
                progress=self._made_progress,
            )
        facts = {
            name: EngineFacts(max_rows=engine.free_rows, joins=engine.joins)
            for name, engine in self._engines.items()
        }
        self._steps = self._slowest_ns = 0
        self._parent.send(Ready(facts, time.monotonic_ns() - began))

    def _listen(self) -> None:
        """Take commands while a step runs: a cancel must not wait for the end of a batch."""
        try:
            while True:
                command = self._parent.recv()
                if isinstance(command, Cancel):
                    self._engines[command.model].cancel(command.sequence_id)
                else:
                    self._inbox.put(command)
        except (EOFError, OSError):
            os._exit(0)

    def _admit(self) -> None:
        """Hand over what arrived; sleep only when no engine has anything to do."""
        idle = not any(engine.has_work for engine in self._engines.values())
        while idle or not self._inbox.empty():
            command = self._inbox.get()
            if idle:
                self._since_ns = time.monotonic_ns()
            self._engines[command.model].admit(command.batch_id, command.sequences)
            idle = False

    def _step(self, model: str, engine: Engine) -> None:
        try:
            generations = engine.step()
        except OutOfMemory:
            self._parent.send(DidNotFit(model))
            return
        finally:
            self._made_progress()
        stats: Seq[StepStats] = engine.take_stats() if generations else ()
        if generations or stats:
            self._parent.send(Stepped(model, generations, list(stats)))

    def _made_progress(self) -> None:
        began_ns, self._since_ns = self._since_ns, time.monotonic_ns()
        self._steps += 1
        faded_ns = self._slowest_ns - self._slowest_ns // FADING
        self._slowest_ns = max(self._since_ns - began_ns, faded_ns)
        PROGRESS.pack_into(self._progress, 0, self._steps, self._slowest_ns)


def main() -> None:
    """`python -m app.worker.engine.process SOCKET_FD PROGRESS_FD`, by the engine host alone."""
    socket_fd, progress_fd = int(sys.argv[1]), int(sys.argv[2])
    parent = Connection(socket_fd)
    _be_killed_first()
    process = EngineProcess(parent, mmap.mmap(progress_fd, PROGRESS.size))
    try:
        process.run()
    except (EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        os._exit(0)
    except BaseException as error:
        loaded = bool(process._engines)
        _say_why(parent, error, will_not_load=not loaded)
        os._exit(ENGINE_FAILED if loaded else FAILED_TO_LOAD)


def _be_killed_first() -> None:
    """A host without memory is to kill this process and not the worker, which would find out
    whose fault it was. Linux alone knows such a wish: proc_pid_oom_score_adj(5)."""
    score = Path("/proc/self/oom_score_adj")
    with suppress(OSError):
        score.write_text(str(min(1_000, int(score.read_text()) + KILLED_FIRST)))


def _say_why(parent: Connection, error: BaseException, *, will_not_load: bool) -> None:
    """Our own errors speak for themselves; others may quote data, so only their place is told."""
    if isinstance(error, GristmillError):
        reason = error.message
    else:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__} in {Path(last.filename).name} line {last.lineno}"
    try:
        parent.send(Broken(reason, will_not_load))
    except OSError:
        pass


if __name__ == "__main__":
    main()
