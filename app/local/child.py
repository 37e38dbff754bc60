"""Child processes: each with a log, and none that outlives us.

A child ends when this process ends, even by kill -9 (on Linux, through `setpriv --pdeathsig`).
Start children from a thread that outlives them: the kernel watches the thread, not the process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import psutil

from app.config import private
from app.errors import ConfigError, Unavailable

STOP_TIMEOUT_S: Final = 10.0


class Child:
    """A process of ours, in a session of its own so that a terminal's Ctrl-C reaches only us.

    `stop` sends the stop signals in turn, each with an equal part of the time, then kills the
    whole process group. Output goes to `log`, whose folder is for this user alone, as are the files
    that the process makes.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        stop_signals: Sequence[signal.Signals] = (signal.SIGTERM,),
        death_signal: signal.Signals = signal.SIGKILL,
        prefix: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.log = log
        self._command = [*with_parent(death_signal, prefix), *command]
        self._env = env
        self._stop_signals = stop_signals
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def exit_code(self) -> int | None:
        """None while it runs or before it was started; negative is the signal that ended it."""
        return self._process.poll() if self._process else None

    def start(self, *, stdin: bytes = b"", keep_open: Sequence[int] = ()) -> None:
        private.folder(self.log.parent)
        with private.file(self.log, "ab") as output:
            self._log_start = output.tell()
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=self._env,
                pass_fds=keep_open,
                umask=private.UMASK,
                start_new_session=True,
                preexec_fn=_heed_signals,  # noqa: PLW1509  nothing but system calls
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(stdin)

    def prepare(self) -> None:
        """There is nothing to do before the start that takes long."""

    def launch(self) -> None:
        self.start()

    def wait_until(
        self,
        ready: Callable[[], bool],
        timeout_s: float,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        """Return once `ready`; raises `Unavailable` with the log's last lines if it ends first.

        While it `is_busy` becoming ready, the time begins anew.
        """
        deadline = time.monotonic() + timeout_s
        while not ready():
            if self.exit_code is not None:
                raise Unavailable(
                    f"{self.name} ended with exit code {self.exit_code}:{self.tail()}"
                )
            if time.monotonic() > deadline and is_busy():
                deadline = time.monotonic() + timeout_s
            if time.monotonic() > deadline:
                raise Unavailable(f"{self.name} was not ready in {timeout_s:g} s:{self.tail()}")
            time.sleep(0.02)

    def tail(self, lines: int = 8) -> str:
        """The last lines logged since the start, and where the rest is, each after a line break."""
        try:
            with self.log.open("rb") as log:
                log.seek(self._log_start)
                text = log.read().decode(errors="replace")
        except OSError:
            text = ""
        return "".join(
            f"\n  {line}" for line in [*text.splitlines()[-lines:], f"(log: {self.log})"]
        )

    def signal_stop(self) -> None:
        """Send the first stop signal and return at once."""
        if self._process and self._process.poll() is None:
            self._process.send_signal(self._stop_signals[0])

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        if self._process is None:
            return
        for number in self._stop_signals:
            if self._process.poll() is None:
                self._process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(max(0, timeout_s / len(self._stop_signals)))
        self.kill()
        self._process.wait()

    def kill(self) -> None:
        """End it now, and all that came of it; returns at once: `exit_code` tells when it is gone.

        Postgres' processes have groups of their own.
        """
        if self._process is None:
            return
        if self._process.poll() is None:
            with contextlib.suppress(psutil.Error):
                for each in psutil.Process(self._process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        each.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _heed_signals() -> None:
    """In a child, before its program: a shell's job in the background ignores these, and with it
    whatever it starts."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def with_parent(death_signal: signal.Signals, options: Sequence[str] = ()) -> list[str]:
    """A command prefix: the kernel sends the child this signal when its parent dies."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        if options:
            raise ConfigError(
                "Postgres does not run as root, and setpriv (package util-linux) is missing to "
                "start it as another user: run as an ordinary user, or set GRISTMILL_DATABASE__URL."
            )
        return []
    return [setpriv, "--pdeathsig", death_signal.name, *options, "--"]
