"""Threads that a process cannot do without: one that fails is started again, or ends its process.

Python prints "Exception in thread" and goes on without the thread. A worker without its lease, or
an API that no longer hears the database, would then live on and be of no use until somebody looks.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NoReturn

log = logging.getLogger(__name__)

RESTART_S: Final = 1.0
"""Pause before a thread is started again; it grows by as much with every failure in a row."""
MAX_FAILURES: Final = 8
"""In a row; then whatever is wrong does not pass, and the process ends."""
SOUND_S: Final = 60.0
"""A thread that has run for so long was well, and its next failure is a first one."""


def end_process(reason: str) -> NoReturn:
    """End this process at once, whatever its other threads do, for its supervisor to start anew."""
    log.critical("The process ends: %s", reason, extra={"action": "process_ends"})
    logging.shutdown()
    os._exit(os.EX_SOFTWARE)


def place_of(error: BaseException) -> str:
    """Type and place of an exception, without its text: that may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" in {Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else ""
    return type(error).__name__ + where


class Background(threading.Thread):
    """Runs `work` until it returns. Whatever it raises is logged, and it is called again.

    `stopping`, once set, ends that. After `max_failures` failures in a row `give_up` is called with
    a sentence, which by default ends the process.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], object],
        stopping: threading.Event | None = None,
        *,
        max_failures: int = MAX_FAILURES,
        give_up: Callable[[str], object] = end_process,
        restart_s: float = RESTART_S,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._stopping = stopping or threading.Event()
        self._max_failures = max_failures
        self._give_up = give_up
        self._restart_s = restart_s

    def run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            began_s = time.monotonic()
            try:
                self._work()
                return
            except BaseException as error:
                is_first = time.monotonic() - began_s > SOUND_S
                failures = 1 if is_first else failures + 1
                self._log(error, failures)
            if failures >= self._max_failures:
                self._give_up(f"the thread {self.name} failed {failures} times in a row.")
                return
            self._stopping.wait(failures * self._restart_s)

    def _log(self, error: BaseException, failures: int) -> None:
        frames = "".join(traceback.format_tb(error.__traceback__))
        log.error(
            "The thread %s failed: %s\n%s",
            self.name,
            place_of(error),
            frames,
            extra={"action": "thread_failed", "failures": failures},
        )


@contextmanager
def beside(name: str, work: Callable[[threading.Event], object]) -> Iterator[None]:
    """Runs `work` in the background of the block; the event that it is given says when to end."""
    stop = threading.Event()
    thread = Background(name, lambda: work(stop), stop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
