"""`run.json`: how commands in other terminals find the system that `gristmill up` runs.

It holds, by their names, the settings that `up` chose: addresses, ports and passwords. It counts
only while the process that wrote it lives, which the lock on the file beside it tells. Who asks for
the lock takes none: any number may ask at once, and none of them is ever taken for an `up`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from app.config import private
from app.errors import ConfigError

_FLOCK: Final = "hhqqi0q"
"""`struct flock` of fcntl(2): type, whence, start, length, pid."""


@contextlib.contextmanager
def only_one(cache_dir: Path) -> Iterator[None]:
    """Hold the folder's lock.

    Raises `ConfigError` if another `gristmill up` has it, or if the folder cannot be used.
    """
    lock = _take(cache_dir)
    try:
        yield
    finally:
        (cache_dir / "run.json").unlink(missing_ok=True)
        os.close(lock)


def _take(cache_dir: Path) -> int:
    """A file descriptor that holds the lock, with our process id in the file."""
    lock = -1
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        private.folder(cache_dir)
        lock = os.open(cache_dir / "up.lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.fcntl(lock, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, 0, 0, 0, 0))
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        return lock
    except BlockingIOError:
        os.close(lock)
        raise _already(cache_dir) from None
    except OSError as error:
        if lock >= 0:
            os.close(lock)
        raise ConfigError(
            f"cache_dir cannot be used: {error.filename or cache_dir}: {error.strerror}. Make it "
            "a folder that you can write to, or set GRISTMILL_CACHE_DIR to another one."
        ) from None


def require_free(cache_dir: Path) -> None:
    """Raises `ConfigError` if a `gristmill up` runs here."""
    if is_running(cache_dir):
        raise _already(cache_dir)


def _already(cache_dir: Path) -> ConfigError:
    return ConfigError(
        f"Gristmill is already running here (process {_written(cache_dir) or 'unknown'}). "
        "`gristmill down` stops it; or set GRISTMILL_CACHE_DIR to another folder than "
        f"{cache_dir}."
    )


def write(cache_dir: Path, chosen: Mapping[str, Any]) -> None:
    """Replace the file at once; for this user's eyes only, since URLs hold passwords."""
    new = cache_dir / "run.json.new"
    with private.file(new, "w") as out:
        json.dump(chosen, out, indent=2)
    new.rename(cache_dir / "run.json")


def read(cache_dir: Path) -> dict[str, Any]:
    """What the running system chose; empty if none runs.

    Raises `ConfigError` if one runs and its file is damaged.
    """
    if not is_running(cache_dir):
        return {}
    file = cache_dir / "run.json"
    try:
        chosen = json.loads(file.read_bytes())
    except OSError:  # still starting, or another user's
        return {}
    except (ValueError, RecursionError):
        chosen = None
    if not isinstance(chosen, dict):
        raise ConfigError(
            f"{file} is damaged, and says no more where what runs here is: `gristmill down`, then "
            "`gristmill up`, write it anew."
        )
    return chosen


def is_running(cache_dir: Path) -> bool:
    """Whether a `gristmill up` has the folder's lock, as far as this user may know."""
    try:
        lock = os.open(cache_dir / "up.lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        asked = struct.pack(_FLOCK, fcntl.F_RDLCK, 0, 0, 0, 0)
        found = fcntl.fcntl(lock, fcntl.F_OFD_GETLK, asked)
    finally:
        os.close(lock)
    return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)


def process(cache_dir: Path) -> int | None:
    """The process of the `gristmill up` that runs here; None if none does.

    Raises `ConfigError` if one does and its process cannot be seen from here.
    """
    if not is_running(cache_dir):
        return None
    written = _written(cache_dir)
    if not (written and _has_open(written, cache_dir / "up.lock")):
        raise ConfigError(
            f"Something holds {cache_dir / 'up.lock'}, and it is no process that can be seen from "
            "here: it is another user's, or of another container."
        )
    return written


def is_anothers(cache_dir: Path) -> str | None:
    """The name of the user whose folder this is, if it is another's than ours."""
    try:
        owner = cache_dir.stat().st_uid
    except OSError:
        return None
    if owner == os.geteuid():
        return None
    try:
        return pwd.getpwuid(owner).pw_name
    except KeyError:
        return str(owner)


def _written(cache_dir: Path) -> int | None:
    """The process id that the lock's holder left in the file."""
    with contextlib.suppress(OSError, ValueError):
        return int((cache_dir / "up.lock").read_bytes())
    return None


def _has_open(process: int, file: Path) -> bool:
    """Process ids are used again, and are others in another container."""
    with contextlib.suppress(OSError):
        wanted = file.stat()
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.path.samestat(descriptor.stat(), wanted):
                    return True
    return False
