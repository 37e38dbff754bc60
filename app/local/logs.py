"""The log files of the parts: `cache_dir/logs/PART.log`, older ones as PART.log.1, .2 and so on.

They go on from one start to the next, so that what was logged before a crash is there after it. A
part writes at the end of its file, wherever that is: a file that has become large is copied and
emptied under its writer.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from app.config import private

MAX_BYTES: Final = 10_000_000
"""Of one file; then it is the next older one's turn."""
KEPT: Final = 3
"""Older files of a part."""
AGAIN_S: Final = 60.0
"""Pause before a file is tried again that could not be copied, as on a full disk."""


class Log:
    """A file that another process writes, read as it grows, from its present end on."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._read_to = _size(file)
        self._rotate_at_s = 0.0

    def new_lines(self) -> Iterator[bytes]:
        """Whole lines that came since the last call; all of a file that was emptied since."""
        if _size(self.file) < self._read_to:
            self._read_to = 0
        with contextlib.suppress(OSError), self.file.open("rb") as log:
            log.seek(self._read_to)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                self._read_to += len(line)
                yield line[:-1]

    def last_lines(self, count: int) -> list[bytes]:
        """The lines before those that `new_lines` brings, some out of older files if need be."""
        lines: list[bytes] = []
        for file in (self.file, *(_older(self.file, number) for number in range(1, KEPT + 1))):
            if len(lines) >= count:
                break
            with contextlib.suppress(FileNotFoundError), file.open("rb") as log:
                upto = self._read_to if file is self.file else -1
                lines = [*log.read(upto).splitlines(), *lines]
        return lines[max(0, len(lines) - count) :]

    def keep_small(self) -> None:
        """Begin a new file if this one is large. What cannot be done now is done later."""
        if _size(self.file) <= MAX_BYTES or time.monotonic() < self._rotate_at_s:
            return
        try:
            rotate(self.file)
        except OSError:
            self._rotate_at_s = time.monotonic() + AGAIN_S


def rotate(file: Path) -> None:
    """Let FILE.1 hold what FILE held; the oldest goes. Raises `OSError`, and then nothing is lost.

    What is written while the last bytes are copied is lost.
    """
    new = file.with_name(f"{file.name}.new")
    try:
        with file.open("rb") as log, private.file(new, "wb") as out:
            shutil.copyfileobj(log, out, 1 << 20)
    except OSError:
        new.unlink(missing_ok=True)
        raise
    for number in range(KEPT, 1, -1):
        with contextlib.suppress(FileNotFoundError):
            _older(file, number - 1).rename(_older(file, number))
    new.rename(_older(file, 1))
    os.truncate(file, 0)


def parts_of(folder: Path) -> list[str]:
    """Names of the parts that have logged here. Raises `OSError` if they are not for this user."""
    try:
        names = [file.name for file in folder.iterdir()]
    except FileNotFoundError:
        return []
    return sorted(name.removesuffix(".log") for name in names if name.endswith(".log"))


def _older(file: Path, number: int) -> Path:
    return file.with_name(f"{file.name}.{number}")


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
