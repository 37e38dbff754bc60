"""How a part without a port says that it is alive: files that it touches.

`NAME.alive` once it has done its work, `NAME.tried` also when it could not.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from app import telemetry

health_log = telemetry.say_once(logging.getLogger(__name__))

ALIVE_S: Final = 60.0
"""A part that has not said so for this long is not alive."""


class Alive:
    """Of one part, in the cache folder of its machine."""

    def __init__(self, cache_dir: str, name: str) -> None:
        self._name = name
        self._alive = Path(cache_dir) / f"{name}.alive"
        self._tried = Path(cache_dir) / f"{name}.tried"

    def note(self, *, has_worked: bool) -> None:
        """A folder that cannot be written makes the part look dead, and does not end it."""
        try:
            for file in [self._tried, *([self._alive] if has_worked else [])]:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
        except OSError as error:
            extra = {"action": "not_noted_alive"}
            text = "That %s is alive cannot be noted: %s"
            health_log.warning(text, self._name, error, extra=extra)

    def forget(self) -> None:
        for file in (self._alive, self._tried):
            with suppress(OSError):
                file.unlink()

    @property
    def is_alive(self) -> bool:
        """Whether it has worked within the last `ALIVE_S`."""
        return _is_young(self._alive)

    @property
    def has_tried(self) -> bool:
        """The same, or could not for what others said."""
        return _is_young(self._tried)


def _is_young(file: Path) -> bool:
    """By a clock that may have been set; one that is ahead of us is not trusted either."""
    try:
        return abs(time.time() - file.stat().st_mtime) < ALIVE_S
    except OSError:
        return False
