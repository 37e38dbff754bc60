"""Ctrl-C, SIGTERM and a closed terminal while jobs are submitted."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from app.cli.interrupts import is_heeded
from app.cli.terminal import tell
from app.local.signals import handled

T = TypeVar("T")

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SoftStop:
    """Ends the work between two pages: what is under way is answered first, so that the ids of
    jobs that were accepted are known. A second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self._is_asked = False
        self._may_end_now = True  #: nothing is under way

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Within this, signals go by the rules of this class."""
        with handled(filter(is_heeded, SIGNALS), self._on_signal):
            yield
            self.end_if_asked()

    def reading(self, items: Iterable[T]) -> Iterator[T]:
        """The items: between two of them may be the end, and while one is waited for."""
        for item in items:
            self._may_end_now = False
            yield item
            self.end_if_asked()
            self._may_end_now = True
        self._may_end_now = False

    def end_if_asked(self) -> None:
        if self._is_asked:
            raise KeyboardInterrupt

    def pausing(self) -> None:
        """What is under way meets an API that is away: that is not waited for."""
        self.end_if_asked()
        self._may_end_now = True

    def answered(self) -> None:
        self._may_end_now = False

    def _on_signal(self, *_: object) -> None:
        if self._is_asked or self._may_end_now:
            raise KeyboardInterrupt
        self._is_asked = True
        tell("Interrupted: what is under way is answered first. Ctrl-C again ends at once.")
