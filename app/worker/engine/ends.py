"""Ends that the engine process has not told yet.

What an end makes others compute (a commit, a notification, whoever waits) is taken from the next
steps, where all run on the same cores. So where sequences join and leave at any step, some time
passes between two tellings, and what ends meanwhile is told together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from app.engines.base import Generation

PART: Final = 10
"""Between a telling and that of an end passes one part in so many of the latter's time here."""
LONGEST_NS: Final = 500_000_000
ROWS: Final = 8
"""Of a full engine one row in so many is kept by ends, and no more: others may wait for them. An
engine in flight has more than that inside that wait for a slot."""


class Ends:
    """Of one model: what has ended and was not told yet."""

    def __init__(self, max_rows: int, *, joins: bool) -> None:
        self._max_rows = max_rows
        self._joins = joins
        self._held: list[Generation] = []
        self._due_ns = 0  #: when they are to be told, at the latest
        self._told_ns = 0  #: when some were told last

    def add(
        self,
        generations: Iterable[Generation],
        arrived_ns: Mapping[int, int],
        *,
        are_watched: bool = False,
    ) -> None:
        """`arrived_ns`: when sequences came, by id. `are_watched`: somebody looks on, at their
        tokens."""
        for each in generations:
            since_ns = arrived_ns.get(each.sequence_id) or each.started_ns
            due_ns = 0 if are_watched else due_after_ns(self._told_ns, each, since_ns)
            self._due_ns = min(self._due_ns, due_ns) if self._held else due_ns
            self._held.append(each)

    def are_due(self, now_ns: int, num_inside: int) -> bool:
        """Whether to tell them now. `num_inside`: of sequences that have not ended."""
        if not self._held:
            return False
        is_full = num_inside + len(self._held) >= self._max_rows
        has_enough = is_full and len(self._held) > self._max_rows // ROWS
        return not self._joins or not num_inside or has_enough or now_ns >= self._due_ns

    def take(self, now_ns: int) -> list[Generation]:
        taken, self._held = self._held, []
        if taken:
            self._told_ns = now_ns
        return taken


def due_after_ns(told_ns: int, ended: Generation, since_ns: int) -> int:
    """When the end of one that is here since `since_ns` is to be told at the latest, if others were
    at `told_ns`. At once, 0, if somebody looks at what becomes of a cancel."""
    if ended.is_cut_short:
        return 0
    return told_ns + min(LONGEST_NS, (ended.finished_ns - since_ns) // PART)
