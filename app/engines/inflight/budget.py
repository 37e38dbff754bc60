"""How many prompt tokens a step may compute, so that those who decode are not kept waiting."""

from __future__ import annotations

from typing import Final

_FIRST: Final = 256
_LEAST: Final = 32
_MOST: Final = 4096
_UNIT: Final = 64
"""Tokens at which the two parts of a step's time are corrected alike."""

_GAIN: Final = 0.2
"""How much of what a step's time was mispredicted by is corrected."""


class PromptBudget:
    """Follows the measured pace. `fixed` tokens instead, if it is not 0.

    A step takes a fixed time, most of it for fetching the weights, and a time for each token. Both
    are corrected after every step, by normalised least mean squares: steps of few tokens settle the
    one, steps with prompts the other.
    """

    def __init__(self, stall_ms: float, fixed: int = 0) -> None:
        self._stall_ns = stall_ms * 1e6
        self._fixed = fixed
        self._step_ns = 0.0
        self._unit_ns = self._stall_ns * _UNIT / _FIRST

    @property
    def most(self) -> int:
        """What `tokens` may come to."""
        return self._fixed or _MOST

    def tokens(self, num_rows: int) -> int:
        """For a step in which so many rows decode."""
        if self._fixed:
            return self._fixed
        units = (self._stall_ns - self._step_ns) / self._unit_ns
        return int(min(max(units * _UNIT - num_rows, _LEAST), _MOST))

    def observe(self, num_tokens: int, device_ns: int) -> None:
        """A step computed so many tokens, of prompts and of answers."""
        units = num_tokens / _UNIT
        missed = device_ns - self._step_ns - units * self._unit_ns
        correction = _GAIN * missed / (1 + units * units)
        self._step_ns = max(0.0, self._step_ns + correction)
        self._unit_ns = max(1.0, self._unit_ns + correction * units)
