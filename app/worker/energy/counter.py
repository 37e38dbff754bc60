"""What a counter of energy is, whoever keeps it."""

from __future__ import annotations

from typing import Protocol


class Counter(Protocol):
    """Energy since some moment in the past, that only rises but where it begins anew."""

    @property
    def wraps_at_nj(self) -> int | None:
        """Where it goes back to 0; None if it does not."""

    def read(self) -> int | None:
        """Nanojoules; None where it cannot be read now. Raises nothing, and may take milliseconds:
        it asks a driver."""


class Unusable(Exception):
    """Why there is no such counter here: half a sentence for people."""
