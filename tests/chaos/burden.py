"""What good clients feel of a burden: their p99 without and with it, one right after the other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final

from tests.chaos.scene import Scene

ROUNDS: Final = 3
"""One has to be well: a busy neighbour is there now and then, a fault of ours always."""


def compare(
    scene: Scene,
    what: str,
    p99_ms: Callable[[], float],
    burden: Callable[[], AbstractContextManager[Any]],
    is_well: Callable[[float, float], bool],
) -> None:
    """Expects that it is well; all rounds are noted."""
    for _ in range(ROUNDS):
        quiet_ms = p99_ms()
        with burden():
            noisy_ms = p99_ms()
        told = f"p99 of good clients: {quiet_ms:.0f} ms without {what}, {noisy_ms:.0f} ms with."
        scene.note(told)
        if is_well(quiet_ms, noisy_ms):
            return
    scene.expect(False, "I8", told)


def p99(took: list[float]) -> float:
    return sorted(took)[int(0.99 * len(took))]
