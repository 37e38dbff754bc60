"""What ended jobs took of the device, until Redis is told, so that tenants take turns by that.

It goes along with what a worker says anyway: a round trip of its own would cost more than the
telling. What is not told when the process ends is forgotten: its tenants were charged as estimated.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from app.broker import lanes
from app.broker.lanes import Used, Whose
from app.broker.queues import Layout

PAUSE_S: Final = 0.5
"""Between two tellings: one for each batch would cost Redis more than it tells."""


class Tally:
    """Outlives connections. Any thread notes; the one that talks to Redis does the rest."""

    def __init__(self, layout: Layout) -> None:
        self._layout: Final = layout
        self._noted: Final[deque[tuple[Whose, Used]]] = deque()
        self._told_at = -math.inf  #: by the monotonic clock

    def note(self, whose: Whose, used: Used) -> None:
        self._noted.append((whose, used))

    @property
    def is_due(self) -> bool:
        """Whether to tell it now, alone if need be."""
        return bool(self._noted) and time.monotonic() >= self._told_at + PAUSE_S

    def tell(self, pipe: Any) -> dict[Whose, Used]:
        """Add one command to the pipeline, if it is due; what it tells."""
        used: dict[Whose, Used] = {}
        if self.is_due:
            while self._noted:
                whose, each = self._noted.popleft()
                used[whose] = used.get(whose, Used()) + each
            self._told_at = time.monotonic()
            lanes.note_used(pipe, used, self._layout)
        return used

    def keep(self, used: Mapping[Whose, Used]) -> None:
        """It was not heard, as far as is known."""
        self._noted.extend(used.items())
