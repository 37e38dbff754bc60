"""Folders and files for this user's eyes alone: prompts, passwords and logs lie in them.

folder = private.folder(cache_dir / "redis")
with private.file(folder / "password", "w") as out: …
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any, Final

from app.errors import ConfigError

UMASK: Final = 0o077
"""For whatever is started to work in such a folder: it makes files of its own."""


def folder(path: Path) -> Path:
    """The folder, made or mended: no other user passes through it.

    Raises `ConfigError` if it is not ours to close.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be closed to other users ({error.strerror}): prompts would lie open in "
            "it. Give it to the user who runs Gristmill, or set GRISTMILL_CACHE_DIR to another."
        ) from None
    return path


def file(path: Path, mode: str) -> IO[Any]:
    """`open`, for a file that others do not read, even if it was there before."""
    return open(path, mode, opener=_open)


def _open(path: str, flags: int) -> int:
    descriptor = os.open(path, flags, 0o600)
    os.fchmod(descriptor, 0o600)
    return descriptor
