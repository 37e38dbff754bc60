"""The worker's side of the engine process: starts it, talks to it, buries it.

The process is started with `subprocess`, not forked: CUDA cannot be used in a fork, and a fresh
interpreter inherits no locks, sockets or threads of the worker.
"""

from __future__ import annotations

import logging
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from app.engines.base import Sequence
from app.errors import EngineError
from app.worker.engine.hours import Hours
from app.worker.engine.page import PAGE_BYTES, PROGRESS
from app.worker.engine.pipe import WorkerEnd
from app.worker.engine.wire import (
    Admit,
    Broken,
    Cancel,
    Command,
    DidNotFit,
    EngineFacts,
    Event,
    LoadModels,
    Ready,
    Recall,
    Recalled,
    Stepped,
)

log = logging.getLogger(__name__)

LAUNCH: Final = Path(__file__).with_name("launch.py")

SPINS: Final = {"GOMP_SPINCOUNT": "60000"}
"""About a millisecond, after which a thread that waits for work leaves its core to others. OpenMP's
own measure is five: by then a step would have begun, and whoever had to share a core with it stood
still for nothing."""

LEARNED_AFTER: Final = 32
"""Steps after which their pace is known; the first ones compile and warm up."""
SLOWER: Final = 20
"""A step that takes so many times the slowest of late is a hang."""
STEP_FLOOR_NS: Final = 10_000_000_000
"""No step is called a hang sooner than this: a busy machine may stop anybody for seconds."""
LOAD_FLOOR_NS: Final = 60_000_000_000
CLOSED_S: Final = 5.0
"""Time to die of a process that has closed its connection."""
KILL_S: Final = 10.0
"""Time to die of one that was killed: inside a call of a driver it may not heed even that."""
LOOK_NS: Final = 2_000_000_000
"""Longest time between two looks that counts as no progress: more, and it was we who stood still,
with the engine process as like as not."""


class EngineHost:
    """Owns one engine process, and counts the rows inside it.

    Not thread-safe: only the runner thread calls it. Others may read `ready` and `is_slow`.
    """

    def __init__(
        self,
        load: LoadModels,
        *,
        load_timeout_s: float,
        step_timeout_s: float,
        python: str = sys.executable,
        hear_tokens: Callable[[socket.socket], object] | None = None,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`python` is the interpreter of the engine process. `hear_tokens` gets our end of the
        socket over which each process says `Streamed`, to keep."""
        self._load = load
        self._hear_tokens = hear_tokens
        self._python = python
        self._now_ns = now_ns
        self._load_timeout_ns = int(load_timeout_s * 1e9)
        self._step_timeout_ns = int(step_timeout_s * 1e9)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: WorkerEnd | None = None
        self._progress: mmap.mmap | None = None
        self._shown = (0, 0)  #: what the page said at the last look
        self._looked_ns = 0
        self._still_ns = 0  #: time without progress
        self._load_ns = 0  #: what the last load took
        self._engines: dict[str, EngineFacts] = {}
        self._rows: dict[str, int] = {}
        self._ahead: dict[str, int] = {}  #: rows that wait there until those inside are over
        self.hours = Hours(now_ns)

    def start(self) -> None:
        """Start a process; it says `Ready` when the models are loaded."""
        self._spawn()
        self._engines, self._rows = {}, dict.fromkeys((m.name for m in self._load.models), 0)
        self._ahead = dict(self._rows)
        self._shown = (0, 0)
        self._count_anew()
        self._send(self._load)

    def _spawn(self) -> None:
        page = _shared_page()
        ours, theirs = socket.socketpair()
        heard, told = socket.socketpair() if self._hear_tokens else (None, None)
        try:
            self._progress = mmap.mmap(page, PAGE_BYTES)
            self.hours.begin(self._progress)
            fds = (theirs.fileno(), page, *([told.fileno()] if told else []))
            self._process = subprocess.Popen(
                [self._python, str(LAUNCH), *map(str, fds)],
                stdin=subprocess.DEVNULL,
                pass_fds=fds,
                env=SPINS | os.environ,
                # Ctrl-C in a terminal goes to the worker, which decides what becomes of the batch.
                start_new_session=True,
            )
        finally:
            theirs.close()
            if told is not None:
                told.close()
            os.close(page)
        self._connection = WorkerEnd(ours)
        if self._hear_tokens is not None and heard is not None:
            self._hear_tokens(heard)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def connection(self) -> WorkerEnd | None:
        """To wait on; readable when the process said something or died."""
        return self._connection

    @property
    def ready(self) -> bool:
        return bool(self._engines)

    @property
    def busy(self) -> bool:
        return any(self._rows.values())

    def joins(self, model: str) -> bool:
        """Whether this model's engine admits more between its steps."""
        return self.ready and self._engines[model].joins

    def max_rows(self, model: str) -> int:
        """Sequences that this model's engine takes when it is empty."""
        return self._engines[model].max_rows if self.ready else 0

    def free_rows(self, model: str) -> int:
        """Sequences that the engine would take now; a static engine takes none while it runs."""
        if not self.ready:
            return 0
        facts, inside = self._engines[model], self._rows[model]
        if facts.joins:
            return facts.max_rows - inside
        return 0 if inside else facts.max_rows

    def must_wait(self, model: str) -> bool:
        """Whether what is admitted now waits there until those inside are over."""
        return not self.joins(model) and self._rows[model] > 0

    def has_waiting(self, model: str) -> bool:
        """Whether something waits there already."""
        return self._ahead[model] > 0

    def admit(self, model: str, batch_id: str, sequences: Iterable[Sequence]) -> None:
        command = Admit(model, batch_id, tuple(sequences))
        if not self.busy:
            self._count_anew()
        rows = self._ahead if self.must_wait(model) else self._rows
        rows[model] += len(command.sequences)
        self._send(command)

    def recall(self, model: str) -> None:
        """Ask for what has not begun; it comes back by `Recalled`."""
        self._send(Recall(model))

    def cancel(self, model: str, sequence_id: int) -> None:
        self._send(Cancel(model, sequence_id))

    def events(self) -> list[Event]:
        """What the process said since the last call; ends with `Broken` if it died."""
        heard: list[Event] = []
        while self._connection is not None:
            try:
                if not self._connection.poll():
                    break
                heard.append(self._take(self._connection.recv()))
            except (EOFError, OSError):
                if not any(isinstance(event, Broken) for event in heard):
                    heard.append(self._bury())
                self.kill()
        return heard

    def is_stuck(self) -> bool:
        """Whether the process is loading or busy and has shown no progress for too long.

        To be called often while it is: each call adds the time since the last one.
        """
        if self._progress is None or (self.ready and not self.busy):
            self._still_ns = 0
            return False
        now_ns, shown = self._now_ns(), PROGRESS.unpack_from(self._progress)
        self._still_ns += min(now_ns - self._looked_ns, LOOK_NS)
        self._looked_ns = now_ns
        if shown != self._shown:
            self._shown, self._still_ns = shown, 0
        return self._still_ns > self._limit_ns()

    @property
    def is_slow(self) -> bool:
        """Whether a step has taken so long already that it may well be stuck."""
        return 2 * self._still_ns > self._limit_ns()

    def _limit_ns(self) -> int:
        if not self.ready:
            return load_limit_ns(self._load_ns, self._load_timeout_ns)
        return step_limit_ns(*self._shown, self._step_timeout_ns)

    def _count_anew(self) -> None:
        self._looked_ns, self._still_ns = self._now_ns(), 0

    def kill(self) -> None:
        """End the process at once and forget what was inside.

        Raises `EngineError` if it does not end: it holds its device, and another one would be
        started in vain.
        """
        if self._process is not None:
            self._process.kill()
            if _status_within(self._process, KILL_S) is None:
                raise EngineError(
                    f"The engine process {self.pid} cannot be ended; its device or the driver "
                    "holds it."
                )
            self.hours.end(was_busy=self.busy)
        if self._connection is not None:
            self._connection.close()
        if self._progress is not None:
            self._progress.close()
        self._process = self._connection = self._progress = None
        self._engines, self._rows = {}, dict.fromkeys(self._rows, 0)
        self._ahead = dict(self._rows)

    def _take(self, event: Event) -> Event:
        match event:
            case Ready(engines=engines, load_ns=load_ns):
                self._engines, self._load_ns = engines, load_ns
            case Stepped(model=model, generations=generations):
                self._leave(model, len(generations))
            case DidNotFit(model=model, sequence_ids=dropped):
                self._leave(model, len(dropped))
            case Recalled(model=model, sequence_ids=recalled):
                ahead = min(len(recalled), self._ahead[model])
                self._ahead[model] -= ahead
                self._leave(model, len(recalled) - ahead)
        return event

    def _leave(self, model: str, rows: int) -> None:
        self._rows[model] -= rows
        if self._rows[model] == 0:
            self._rows[model], self._ahead[model] = self._ahead[model], 0

    def flush(self) -> None:
        """Send what the process had no room for so far; never waits for it."""
        try:
            if self._connection is not None:
                self._connection.flush()
        except OSError:
            pass  # its death is noticed when its events are read

    def _send(self, command: Command) -> None:
        """A dead process is noticed when its events are read, so a failed write is no news."""
        try:
            if self._connection is not None:
                self._connection.send(command)
        except OSError:
            log.warning("The engine process does not take commands.", extra={"pid": self.pid})

    def _bury(self) -> Broken:
        """How the process ended, which was not by this host."""
        if self._process is None:
            return Broken("never started")
        if (status := _status_within(self._process, CLOSED_S)) is None:
            return Broken("it closed its connection")
        if status >= 0:
            return Broken(f"it ended with exit status {status}")
        killed = -status == signal.SIGKILL
        hint = ", as when the host runs out of memory" if killed else ""
        ended = -status == signal.SIGTERM
        return Broken(f"signal {-status} ended it{hint}", was_killed=killed, was_ended=ended)


def _status_within(process: subprocess.Popen[bytes], timeout_s: float) -> int | None:
    """The exit status, negative for a signal, once the process has ended; None if it does not.

    The kernel tells when: `Popen.wait` with a timeout sleeps between looks, by a clock, and fails
    where clocks jump.
    """
    if (status := process.poll()) is not None:
        return status
    descriptor = os.pidfd_open(process.pid)
    try:
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        ended.poll(timeout_s * 1000)
    finally:
        os.close(descriptor)
    return process.poll()


def _shared_page() -> int:
    """A file descriptor of memory for the page, all of it there.

    In a file on a full tmpfs the first write to a page that is not would end the worker by SIGBUS.
    Raises `EngineError` if there is no room.
    """
    try:
        if hasattr(os, "memfd_create"):  # Linux: in no file system
            page = os.memfd_create("gristmill-progress")
        else:
            with tempfile.TemporaryFile() as file:
                page = os.dup(file.fileno())
        os.write(page, bytes(PAGE_BYTES))
    except OSError as error:
        raise EngineError(f"No memory to share with the engine process: {error}.") from None
    return page


def step_limit_ns(num_steps: int, slowest_ns: int, timeout_ns: int) -> int:
    """How long a step may take: many times the slowest of late, and never more than the timeout."""
    if num_steps < LEARNED_AFTER:
        return timeout_ns
    return min(timeout_ns, max(STEP_FLOOR_NS, SLOWER * slowest_ns))


def load_limit_ns(last_ns: int, timeout_ns: int) -> int:
    """How long the models may take to load; much less than the timeout once they have."""
    return min(timeout_ns, max(LOAD_FLOOR_NS, SLOWER * last_ns)) if last_ns else timeout_ns
