"""Which upstream takes the next request, and how many at once. Pure: the caller brings the clock.

An upstream's limit doubles with each limit's worth of answers until it says for the first time that
it is overloaded (429, 503). Then, and each time after, it halves, once for all requests inside, and
grows by one with each limit's worth of answers, but slowly where it was refused before: so it
settles where the server's own limit is, whatever that is. What it asks to be spared for
(Retry-After) it is spared. One that cannot be reached is tried again, by one request, after a pause
that doubles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

FIRST_LIMIT: Final = 8
SLOWLY: Final = 1 / 8
LEAST_PAUSE_S: Final = 0.01
FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0
LONGEST_ASKED_S: Final = 600.0


@dataclass(slots=True, eq=False)
class Load:
    """What is known of one upstream. Times are monotonic nanoseconds."""

    weight: float
    most: int  #: requests at once, whatever it bears
    limit: float = FIRST_LIMIT
    inside: int = 0
    refused_at: float = math.inf  #: requests that were too many, when it last said so
    failures: int = 0  #: in a row
    resumes_ns: int = 0
    cut_ns: int = 0  #: when the limit was last halved
    is_alone: bool = False  #: with a request that is to have it for itself

    def has_room(self, now_ns: int) -> bool:
        if self.is_alone or now_ns < self.resumes_ns:
            return False
        # After failures one request finds out for all the others.
        return self.inside < (1 if self.failures else min(self.most, max(1, int(self.limit))))

    def begin(self, *, alone: bool) -> None:
        self.inside += 1
        self.is_alone = alone

    def end(self) -> None:
        self.inside -= 1
        self.is_alone = False

    def succeeded(self) -> None:
        self.failures = 0
        is_near = abs(self.limit - self.refused_at) <= 1
        pace = 1.0 if math.isinf(self.refused_at) else (SLOWLY if is_near else 1.0) / self.limit
        self.limit = min(self.most, self.limit + pace)

    def overloaded(self, began_ns: int, now_ns: int, asked_s: float | None) -> None:
        """It has refused a request, sent at `began_ns`, for having too many."""
        if began_ns >= self.cut_ns:
            self.refused_at = min(self.limit, self.inside)
            self.limit = max(1.0, self.refused_at / 2)
            self.cut_ns = now_ns
        pause_s = FIRST_PAUSE_S if asked_s is None else min(asked_s, LONGEST_ASKED_S)
        pause_s = max(pause_s, LEAST_PAUSE_S)
        self.resumes_ns = max(self.resumes_ns, now_ns + int(pause_s * 1e9))

    def failed(self, now_ns: int) -> None:
        """It could not be reached, or an answer broke off."""
        if now_ns < self.resumes_ns:
            return  # one of many that were lost together
        pause_s = min(FIRST_PAUSE_S * 2.0 ** min(self.failures, 10), LONGEST_PAUSE_S)
        self.failures += 1
        self.resumes_ns = now_ns + int(pause_s * 1e9)


def choose(loads: Sequence[Load], now_ns: int, *, alone: bool = False) -> Load | None:
    """The one with room that has least to do for its weight; if `alone`, one that is empty."""
    fit = [load for load in loads if load.has_room(now_ns) and not (alone and load.inside)]
    return min(fit, key=lambda load: (load.inside + 1) / load.weight, default=None)


def next_resume_ns(loads: Sequence[Load], now_ns: int) -> int | None:
    """When the first one that is spared now may be asked again."""
    return min((load.resumes_ns for load in loads if load.resumes_ns > now_ns), default=None)
