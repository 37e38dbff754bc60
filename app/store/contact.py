"""How long Postgres has answered: what may be concluded from the silence of others."""

from __future__ import annotations

import math
from collections.abc import Callable


class Contact:
    """For how long Postgres has answered without a break.

    Whoever was cut off from it cannot tell a dead worker from one that was cut off as well.
    """

    def __init__(self, break_s: float, now_s: Callable[[], float]) -> None:
        self._break_s = break_s  #: a longer silence is a break
        self._now_s = now_s
        self._since_s = self._last_s = -math.inf

    def answered(self) -> None:
        now_s = self._now_s()
        if now_s - self._last_s > self._break_s:
            self._since_s = now_s
        self._last_s = now_s

    @property
    def lasts_s(self) -> float:
        now_s = self._now_s()
        return now_s - self._since_s if now_s - self._last_s <= self._break_s else 0.0
