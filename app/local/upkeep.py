"""When a part is started, called ready, given up for hung, killed and started again; pure.

    down ──▶ starting ──▶ ready
     ▲          │ ended     │ ended
     ├──────────┴───────────┤
     │          ▼ silent    ▼ silent for too long
     └─────── ending (it was killed, and is not gone yet)

A part that answers, if only that it is not ready, is never killed: what it waits for may be
nobody's fault. Nor is one that cannot be asked, since what asks it goes through a server that is
away.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Final

MIN_BACKOFF_S: Final = 0.5
MAX_BACKOFF_S: Final = 30.0
STEADY_S: Final = 60.0
"""A part that ran for this long before it ended begins anew with the shortest backoff."""
MAX_STEP_S: Final = 10.0
"""Most that one silence counts for: meanwhile all of us may have been asleep."""


class Answer(enum.Enum):
    """What a part says when it is asked whether it is well."""

    READY = "ready"
    ALIVE = "alive"  #: and not ready
    SILENT = "silent"


class Phase(enum.Enum):
    DOWN = "down"
    STARTING = "starting"
    READY = "ready"
    ENDING = "ending"


@dataclass(frozen=True, slots=True)
class Upkeep:
    """What is known of a part. Times are in seconds of one clock that never goes back."""

    start_s: float  #: it is hung if it says nothing for so long after its start
    hang_s: float  #: the same once it has said something
    phase: Phase = Phase.DOWN
    since_s: float = 0.0  #: of its start while it runs; down: when it may start
    backoff_s: float = 0.0
    has_answered: bool = False  #: since its start
    asked_s: float = 0.0  #: when the last answer, or none, came
    silent_s: float = 0.0  #: for how long there has been none

    @property
    def is_running(self) -> bool:
        return self.phase in (Phase.STARTING, Phase.READY)

    def should_start(self, now_s: float) -> bool:
        return self.phase is Phase.DOWN and now_s >= self.since_s

    def started(self, now_s: float) -> Upkeep:
        begun = Upkeep(self.start_s, self.hang_s, Phase.STARTING, now_s, self.backoff_s)
        return replace(begun, asked_s=now_s)

    def ended(self, now_s: float) -> Upkeep:
        """It has ended, or could not be started."""
        was_steady = self.phase is not Phase.DOWN and now_s - self.since_s > STEADY_S
        doubled_s = 0.0 if was_steady else 2 * self.backoff_s
        backoff_s = min(max(doubled_s, MIN_BACKOFF_S), MAX_BACKOFF_S)
        return replace(self, phase=Phase.DOWN, since_s=now_s + backoff_s, backoff_s=backoff_s)

    def answered(self, answer: Answer | None, now_s: float) -> Upkeep:
        """It was asked, and this is what came; None: it could not be asked."""
        if not self.is_running:
            return self
        if answer is Answer.SILENT:
            silent_s = self.silent_s + min(now_s - self.asked_s, MAX_STEP_S)
            return replace(self, asked_s=now_s, silent_s=silent_s)
        return replace(
            self,
            phase=Phase.READY if answer is Answer.READY else self.phase,
            has_answered=self.has_answered or answer is not None,
            asked_s=now_s,
            silent_s=0.0,
        )

    @property
    def is_hung(self) -> bool:
        """Whether it has been silent for so long that it is of no use any more."""
        limit_s = self.hang_s if self.has_answered else self.start_s
        return self.is_running and self.silent_s > limit_s

    def killed(self) -> Upkeep:
        return replace(self, phase=Phase.ENDING)
