"""How many rows fit into memory, learned from those that did not. Pure.

A ceiling belongs to a model and a bucket of row lengths, the powers of two: what does not fit at
one length does not fit at a greater one either, and says nothing of smaller ones. It halves when
memory runs out and rises by an eighth when eight times as many rows have fitted since.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

PROOFS: Final = 8
"""Full batches that must fit before the ceiling rises."""

NO_CEILING: Final = 1 << 30


class Ceilings:
    """Owns what a worker has learned of its device's and its host's memory."""

    def __init__(self) -> None:
        self._rows: dict[tuple[str, int], int] = {}
        self._fitted: dict[tuple[str, int], int] = {}

    def rows(self, model: str, tokens: int) -> int:
        """Most rows at once, if the longest may have `tokens` tokens, prompt and output."""
        bucket = tokens.bit_length()
        known = (rows for (of, at), rows in self._rows.items() if of == model and at <= bucket)
        return min(known, default=NO_CEILING)

    def room(self, model: str, inside: int) -> Callable[[int], int] | None:
        """By length, the rows that fit beside those inside; None if nothing is known."""
        if all(of != model for of, _ in self._rows):
            return None
        return lambda tokens: self.rows(model, tokens) - inside

    def overflowed(self, model: str, tokens: int, rows: int) -> int:
        """So many rows did not fit; returns the new ceiling."""
        key = model, tokens.bit_length()
        self._rows[key] = min(self.rows(model, tokens), max(1, rows // 2))
        self._fitted[key] = 0
        return self._rows[key]

    def fitted(self, model: str, tokens: int, rows: int) -> None:
        """A job of so many rows ran to its end."""
        key = model, tokens.bit_length()
        if key not in self._rows:
            return
        self._fitted[key] += rows
        ceiling = self._rows[key]
        if self._fitted[key] >= PROOFS * ceiling:
            self._rows[key] = ceiling + max(1, ceiling // 8)
            self._fitted[key] = 0
