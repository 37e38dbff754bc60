"""`gristmill up` in the background: started, waited for and stopped from any terminal.

Who starts it waits at a pipe, whose other end the new process keeps until all is ready. A word
through it means ready; its end without one means that it did not come so far.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from app.config import private, run_file
from app.errors import ConfigError, Unavailable
from app.local.logs import Log

_READY: Final = b"ready"
STOP_S: Final = 30.0
"""It is gone within 10 s, unless the machine is slow or it was stopped by Ctrl-Z."""
TIME: Final = "%Y-%m-%dT%H:%M:%SZ "
_TIME: Final = r"\S+Z "
"""What begins a line of up.log."""


def start(command: Sequence[str], cache_dir: Path, tell: Callable[[str], None]) -> int:
    """Run a command, with `--ready-fd N`, in a session of its own, and wait until all is ready.

    Returns 0 then, else the exit status with which it ended. What it prints goes to logs/up.log,
    and meanwhile to `tell`. An interrupted wait stops it again.
    """
    run_file.require_free(cache_dir)
    log = Log(private.folder(cache_dir / "logs") / "up.log")
    reading, writing = os.pipe()
    with private.file(log.file, "ab") as output, open(reading, "rb", buffering=0) as ready:
        process = subprocess.Popen(
            [*command, "--ready-fd", str(writing)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[writing],
            start_new_session=True,
        )
        os.close(writing)
        try:
            while not select.select([ready], [], [], 0.2)[0]:
                _pass_on(log, tell)
            is_ready = ready.read(len(_READY)) == _READY
        except BaseException:
            process.terminate()
            process.wait(STOP_S)
            raise
    code = 0 if is_ready else process.wait() or 1
    _pass_on(log, tell)
    return code


def say_ready(descriptor: int) -> None:
    """In the new process: whoever waits for it may go."""
    with contextlib.suppress(OSError), open(descriptor, "wb", buffering=0) as pipe:
        pipe.write(_READY)


def stop(cache_dir: Path) -> int | None:
    """Stop what runs here and wait until all of it is gone; returns its process, or None.

    Raises `ConfigError` if it is not ours to stop, and `Unavailable` if it does not end.
    """
    process = run_file.process(cache_dir)
    if process is None:
        return None
    try:
        os.kill(process, signal.SIGTERM)
        os.kill(process, signal.SIGCONT)  # it may have been stopped by Ctrl-Z
    except PermissionError:
        raise ConfigError(
            f"Process {process}, which runs in {cache_dir}, is another user's: only they can stop "
            "it, or root."
        ) from None
    except ProcessLookupError:
        pass
    deadline = time.monotonic() + STOP_S
    while run_file.is_running(cache_dir):
        if time.monotonic() > deadline:
            raise Unavailable(
                f"Process {process} was told to stop and has not within {STOP_S:g} s. `kill -9 "
                f"{process}` ends it, and its parts with it."
            )
        time.sleep(0.05)
    return process


def _pass_on(log: Log, tell: Callable[[str], None]) -> None:
    for line in log.new_lines():
        tell(re.sub(f"^{_TIME}", "", line.decode(errors="replace")))
