"""The engine process: one child per device that owns the models and runs them.

It is started by `app.worker.engine.host` with a socket to talk over and a page of shared memory to
show progress in, and lives no longer than its parent: when the socket closes it exits at once,
loading or computing. Where the interpreter is held up inside a library, the kernel ends it. It
never sees Celery, Redis or Postgres.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import signal
import socket
import sys
import time
from collections import Counter, deque
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from app.collector import keep_what_is_there
from app.engines import builds, registry
from app.engines.base import Engine, Generation, StepStats
from app.engines.hardware import hardware
from app.errors import ConfigError, GristmillError, OutOfMemory
from app.threads import Background, place_of
from app.worker.engine.ends import Ends
from app.worker.engine.outlet import Outlet
from app.worker.engine.page import PAGE_BYTES, PROGRESS, Phase, shown
from app.worker.engine.pipe import EngineEnd
from app.worker.engine.wire import (
    Admit,
    Broken,
    Cancel,
    DidNotFit,
    EngineFacts,
    LoadModels,
    Ready,
    Recall,
    Recalled,
    Stepped,
)

FAILED_TO_LOAD: Final = 3  #: exit status; a restart would not help
FADING: Final = 256
"""The slowest step is forgotten by one part in so many with every step that follows."""
ENGINE_FAILED: Final = 4  #: exit status; the device's state is not to be trusted
KILLED_FIRST: Final = 500
"""Of a thousand: as if half of the host's memory were its own, besides what is."""
PR_SET_PDEATHSIG: Final = 1  #: linux/prctl.h


class EngineProcess:
    """Runs admitted sequences to their end and says so, until its parent goes away."""

    def __init__(
        self, parent: EngineEnd, progress: mmap.mmap, outlet: Outlet | None = None
    ) -> None:
        self._parent = parent
        self._outlet = outlet  #: None where nobody wants tokens before their answers
        self._progress = progress
        self._clock = shown(progress)  #: it began when this process was spawned
        self._steps = 0
        self._since_ns = 0  #: when the step that runs began
        self._slowest_ns = 0
        self._loads: queue.SimpleQueue[LoadModels] = queue.SimpleQueue()
        self._waiting: dict[str, deque[Admit]] = {}  #: by model, what has not begun
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()  #: something waits
        self._engines: dict[str, Engine] = {}
        #: By model, the sequences that have not ended, and when they arrived.
        self._inside: dict[str, dict[int, int]] = {}
        self._latest: Counter[str] = Counter()  #: by model, the last id that went in: ids grow
        self._ends: dict[str, Ends] = {}
        self._streaming: set[int] = set()  #: those of them whose tokens are told as they come
        self._given: Counter[str] = Counter()  #: by model, device time that these have had
        self._stats: dict[str, dict[str, StepStats]] = {}  #: by model and batch, not sent yet
        self.is_ready = False

    def run(self) -> None:
        # From the first on: to load takes long, and a parent that is gone must be noticed.
        Background("listen", self._listen, max_failures=1).start()
        self._load(self._loads.get())
        while True:
            self._admit()
            for model, engine in self._engines.items():
                if engine.has_work:
                    self._step(model, engine)

    def _load(self, command: LoadModels) -> None:
        began = time.monotonic_ns()
        if command.builds is not None:
            builds.keep_in(command.builds)
        for model in command.models:
            try:
                self._engines[model.name] = registry.make(
                    model.factory,
                    model.folder,
                    model.settings,
                    command.device,
                    command.threads,
                    self._made_progress,
                )
            except ConfigError as error:
                raise ConfigError(f"Model {model.name}: {error}") from error
        facts = {
            name: EngineFacts(
                max_rows=engine.free_rows,
                joins=engine.joins,
                kernels=getattr(engine, "kernels", "torch"),
            )
            for name, engine in self._engines.items()
        }
        self._waiting = {name: deque() for name in self._engines}
        self._ends = {name: Ends(each.max_rows, joins=each.joins) for name, each in facts.items()}
        self._steps = self._slowest_ns = 0
        self._turn(Phase.STEP)
        keep_what_is_there()
        self._parent.send(Ready(facts, time.monotonic_ns() - began, hardware(command.device)))
        self.is_ready = True

    def _listen(self) -> None:
        """Take commands while a step runs: a cancel must not wait for the end of a batch."""
        try:
            while True:
                match self._parent.recv():
                    case LoadModels() as load:
                        self._loads.put(load)
                    case Admit(model) as admit:
                        self._waiting[model].append(admit)
                        self._wake.put(None)
                    case Recall(model):
                        self._give_back(model)
                    case Cancel(model, sequence_id):
                        if not self._has_ended(model, sequence_id):
                            self._engines[model].cancel(sequence_id)
        except (EOFError, OSError):
            os._exit(0)

    def _has_ended(self, model: str, sequence_id: int) -> bool:
        """An engine would keep the id for one that is still to come."""
        is_inside = sequence_id in self._inside.get(model, ())
        return not is_inside and sequence_id <= self._latest[model]

    def _give_back(self, model: str) -> None:
        waiting = iter(partial(_taken, self._waiting[model]), None)
        ids = (each.id for admit in waiting for each in admit.sequences)
        self._parent.send(Recalled(model, tuple(ids)))

    def _admit(self) -> None:
        """Hand over what engines take now; sleep only when none has anything to do."""
        was_idle = False
        while True:
            for model, engine in self._engines.items():
                while engine.joins or not engine.has_work:
                    if (admit := _taken(self._waiting[model])) is None:
                        break
                    arrived_ns = {each.id: each.arrived_ns for each in admit.sequences}
                    self._inside.setdefault(model, {}).update(arrived_ns)
                    self._latest[model] = max(arrived_ns, default=self._latest[model])
                    self._streaming.update(each.id for each in admit.sequences if each.stream)
                    engine.admit(admit.batch_id, admit.sequences)
            if any(engine.has_work for engine in self._engines.values()):
                break
            if not was_idle:
                self._turn(Phase.IDLE)
                if self._outlet is not None:
                    self._outlet.rest()
            was_idle = True
            self._wake.get()
        if was_idle:
            self._turn(Phase.STEP)
            self._since_ns = time.monotonic_ns()

    def _step(self, model: str, engine: Engine) -> None:
        for other in self._ends.keys() - {model}:
            self._tell_ends(other)  # this step may be a whole batch, and nothing is told meanwhile
        try:
            generations = engine.step()
        except OutOfMemory:
            if not engine.joins:
                self._give_back(model)  # it may not fit either
            self._tell_ends(model)
            dropped = tuple(self._inside.pop(model, ()))
            self._streaming.difference_update(dropped)
            self._given[model] += self._turn(
                Phase.STEP, self._take_stats(model, engine), in_vain=True
            )
            self._parent.send(DidNotFit(model, dropped, self._given.pop(model)))
            return
        finally:
            self._made_progress()
        self._turn(Phase.STEP, self._take_stats(model, engine))
        are_watched = not self._streaming.isdisjoint(each.sequence_id for each in generations)
        if self._streaming:
            self._tell_tokens(engine, generations)
        if generations:
            self._given[model] -= sum(each.device_ns for each in generations)
            self._ends[model].add(generations, self._inside[model], are_watched=are_watched)
            for each in generations:
                self._inside[model].pop(each.sequence_id, None)
        if self._ends[model].are_due(time.monotonic_ns(), len(self._inside[model])):
            self._tell_ends(model)

    def _tell_ends(self, model: str) -> None:
        if ended := self._ends[model].take(time.monotonic_ns()):
            stats = self._stats.pop(model, {})
            self._parent.send(Stepped(model, ended, list(stats.values())))

    def _tell_tokens(self, engine: Engine, generations: list[Generation]) -> None:
        """Before the answers: whoever hears of those has the last tokens at hand."""
        ended = [each.sequence_id for each in generations if each.sequence_id in self._streaming]
        self._streaming.difference_update(ended)
        tokens = engine.take_tokens()
        if self._outlet is not None:
            self._outlet.send(tokens, ended)

    def _take_stats(self, model: str, engine: Engine) -> int:
        """Keep what the step computed until there is something to say; its device time."""
        taken = engine.take_stats()
        given = sum(each.device_ns for each in taken)
        self._given[model] += given
        kept = self._stats.setdefault(model, {})
        for each in taken:
            if (known := kept.get(each.batch_id)) is None:
                kept[each.batch_id] = each
            else:
                known.add(each)
        return given

    def _turn(self, phase: Phase, given: int = 0, *, in_vain: bool = False) -> int:
        wasted = self._clock.turn(phase, time.monotonic_ns(), given, in_vain=in_vain)
        self._clock.show(self._progress)
        return wasted

    def _made_progress(self) -> None:
        began_ns, self._since_ns = self._since_ns, time.monotonic_ns()
        self._steps += 1
        faded_ns = self._slowest_ns - self._slowest_ns // FADING
        self._slowest_ns = max(self._since_ns - began_ns, faded_ns)
        PROGRESS.pack_into(self._progress, 0, self._steps, self._slowest_ns)


def _taken(waiting: deque[Admit]) -> Admit | None:
    """The first that waits, if another thread has not taken it."""
    try:
        return waiting.popleft()
    except IndexError:
        return None


def main() -> None:
    """Called by `launch` with SOCKET_FD, PROGRESS_FD and, if somebody wants tokens, TOKENS_FD."""
    socket_fd, progress_fd, *tokens_fd = map(int, sys.argv[1:])
    _die_with_parent()
    _be_killed_first()
    parent = EngineEnd(socket.socket(fileno=socket_fd))
    outlet = Outlet(socket.socket(fileno=tokens_fd[0])) if tokens_fd else None
    process = EngineProcess(parent, mmap.mmap(progress_fd, PAGE_BYTES), outlet)
    try:
        process.run()
    except (BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        os._exit(0)
    except BaseException as error:
        _say_why(parent, error, will_not_load=not process.is_ready)
        os._exit(ENGINE_FAILED if process.is_ready else FAILED_TO_LOAD)


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends: prctl(2).

    A library may hold the interpreter for minutes while it loads, so that no thread of ours runs.
    That thread is the worker's runner, which has ended the process by itself before it ends.
    """
    with suppress(OSError, AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _be_killed_first() -> None:
    """A host without memory is to kill this process and not the worker, which would find out
    whose fault it was. Linux alone knows such a wish: proc_pid_oom_score_adj(5)."""
    score = Path("/proc/self/oom_score_adj")
    with suppress(OSError):
        score.write_text(str(min(1_000, int(score.read_text()) + KILLED_FIRST)))


def _say_why(parent: EngineEnd, error: BaseException, *, will_not_load: bool) -> None:
    """Our own errors speak for themselves; others may quote data, so only their place is told."""
    reason = error.message if isinstance(error, GristmillError) else place_of(error)
    try:
        parent.send(Broken(reason, will_not_load))
    except OSError:
        pass
