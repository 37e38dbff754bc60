"""The time that a wait has, and its rounds: each is one long poll."""

from __future__ import annotations

import math
import time
from typing import Final

from gristmill_client.exchange import Patience

HOLD_S: Final = 30
"""How long one long poll is held; a wait is made of many."""


class Timer:
    """`timeout_s` from now; None is without end."""

    def __init__(self, timeout_s: float | None) -> None:
        if timeout_s != timeout_s:
            raise ValueError("timeout_s is not a number.")
        self._timeout_s = timeout_s
        self._round_at = time.monotonic()
        self._ends_at = math.inf if timeout_s is None else self._round_at + timeout_s

    @property
    def is_endless(self) -> bool:
        return self._timeout_s is None

    @property
    def left_s(self) -> float:
        return max(0.0, self._ends_at - time.monotonic())

    def patience(self, seconds: float) -> Patience:
        """With how much an API that is away is asked: until the end, or for `seconds` if there is
        none."""
        return Patience(seconds) if self.is_endless else Patience(math.inf, self._ends_at)

    def begin_round(self) -> int:
        """For how many seconds the server may hold its answer."""
        self._round_at = time.monotonic()
        return int(min(HOLD_S, self.left_s))

    def pause_s(self, what: str, *, shortest_round_s: float) -> float:
        """Until the next round; raises `TimeoutError`, which says `what`, if there is none.

        A round is shorter than it should be where the server did not hold its answer.
        """
        now = time.monotonic()
        if now >= self._ends_at:
            raise TimeoutError(f"{what} after {self._timeout_s} s.")
        return max(0.0, min(self._round_at + shortest_round_s, self._ends_at) - now)
