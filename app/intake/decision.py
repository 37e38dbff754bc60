"""What a caller is told, yes or no: decided once, and it stays so."""

from __future__ import annotations

import threading

from app.errors import Unavailable


class Decision:
    """Taken by whoever comes first: the commit, or the end of the caller's time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_yes: bool | None = None
        self.num_steps = 0  #: of the work that are done: whoever waits sees it go on

    def step(self) -> None:
        """A part is done, and more is to come; raises `Unavailable` if the caller was told no."""
        with self._lock:
            self._go_on()
            self.num_steps += 1

    def commit(self) -> None:
        """Yes. To be called in the transaction when nothing but its commit is left; raises
        `Unavailable` if the caller was told no, so that nothing is committed."""
        with self._lock:
            self._go_on()
            self._is_yes = True

    def _go_on(self) -> None:
        if self._is_yes is False:
            raise Unavailable("The caller's time was over before the commit.")

    def refuse(self) -> bool:
        """No, from here on; False if it is yes already."""
        with self._lock:
            if self._is_yes is None:
                self._is_yes = False
            return not self._is_yes
