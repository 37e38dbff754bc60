"""How many prompt tokens a step may compute, so that those who decode are not kept waiting."""

from __future__ import annotations

from typing import Final

_FIRST: Final = 256
_LEAST: Final = 32
_MOST: Final = 4096
_MEMORY: Final = 0.8
"""Weight of what was known before when a step has been measured."""


class PromptBudget:
    """Follows the measured pace. `fixed` tokens instead, if it is not 0."""

    def __init__(self, stall_ms: float, fixed: int = 0) -> None:
        self._stall_ns = stall_ms * 1e6
        self._fixed = fixed
        self._token_ns = self._stall_ns / _FIRST

    @property
    def tokens(self) -> int:
        return self._fixed or int(min(max(self._stall_ns / self._token_ns, _LEAST), _MOST))

    def observe(self, num_tokens: int, device_ns: int) -> None:
        """A step computed so many tokens. Small ones say nothing: their fixed part is too large."""
        if num_tokens >= _LEAST:
            self._token_ns = _MEMORY * self._token_ns + (1 - _MEMORY) * device_ns / num_tokens
