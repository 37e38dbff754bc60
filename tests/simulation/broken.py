"""What the simulation says when something is not as it must be."""

from __future__ import annotations


class Broken(AssertionError):
    """An invariant does not hold."""


def expect(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise Broken(otherwise)
