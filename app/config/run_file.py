"""`run.json`: how commands in other terminals find the system that `gristmill up` runs.

It holds, by their names, the settings that `up` chose: addresses, ports and passwords. It counts
only while the process that wrote it lives, which the lock on the file beside it tells.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from app.config import private
from app.errors import ConfigError


@contextlib.contextmanager
def only_one(cache_dir: Path) -> Iterator[None]:
    """Hold the folder's lock; raises `ConfigError` if another `gristmill up` has it."""
    private.folder(cache_dir)
    with (cache_dir / "up.lock").open("a+") as lock:
        if not _take(lock.fileno()):
            lock.seek(0)
            raise ConfigError(
                f"Gristmill is already running here (process {lock.read().strip() or 'unknown'}). "
                f"Stop it first, or set GRISTMILL_CACHE_DIR to another folder than {cache_dir}."
            )
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            yield
        finally:
            (cache_dir / "run.json").unlink(missing_ok=True)


def write(cache_dir: Path, chosen: Mapping[str, Any]) -> None:
    """Replace the file at once; for this user's eyes only, since URLs hold passwords."""
    new = cache_dir / "run.json.new"
    with private.file(new, "w") as out:
        json.dump(chosen, out, indent=2)
    new.rename(cache_dir / "run.json")


def read(cache_dir: Path) -> dict[str, Any]:
    """What the running system chose; empty if none runs."""
    try:
        with (cache_dir / "up.lock").open("a+") as lock:
            if _take(lock.fileno()):
                return {}
        chosen: dict[str, Any] = json.loads((cache_dir / "run.json").read_text())
    except OSError:  # never run here, still starting, or another user's
        return {}
    return chosen


def _take(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
