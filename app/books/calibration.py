"""What jobs took of the times that were expected for them, and so what to promise. Pure.

This is split conformal prediction (Vovk et al., 2005; Lei et al., 2018): whatever is wrong with an
estimate, if it is the same for later jobs as for earlier ones, nine of ten end within their p90.
Estimates of different sizes err differently, so each is compared with others of its size. Jobs that
were told at the same time err together, so many of them count for less than as many. Where the
errors drift, p90 is moved with each job that is late or in time, so that in the long run one in ten
is late whatever happens (conformal PID control: Angelopoulos et al., 2023).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final, NamedTuple
from uuid import UUID

from app.books.work import Size

LEAST_S: Final = 1e-3
"""No time is told to be shorter."""
P50: Final = 0.5
P90: Final = 0.9
LOOK_S: Final = 1.0
"""Jobs that come within so long are told from one look at the queue, and err together. Those of a
look count as much as the root of their number."""

GROUP: Final = 15.0
"""Weight of the lessons that a quantile is taken of, at least."""
MOST_GROUPS: Final = 6
UNSEEN: Final = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.5)
"""What jobs are taken to need of their estimates as long as few lessons tell."""

STEP: Final = 0.1
"""How far p90 is moved by a late job that comes alone, as a logarithm; by one in time a ninth."""
MOST_MOVED: Final = 0.8


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that ran to its end. Times are by the database's clock."""

    job_id: UUID
    due_s: float  #: accepted, or its `not_before` if that was later
    started_s: float
    ended_s: float
    size: Size
    max_output_tokens: int
    device_s: float
    estimate_s: float | None  #: what was expected from `due_s` to its end, uncalibrated
    p90_s: float | None  #: what it was promised

    @property
    def took_s(self) -> float:
        return max(self.ended_s - self.due_s, LEAST_S)

    @property
    def own_s(self) -> float:
        return max(self.ended_s - self.started_s, LEAST_S)

    @property
    def is_kept(self) -> bool:
        """Whether it ended within what it was promised, if it was."""
        return self.p90_s is not None and self.took_s <= self.p90_s


@dataclass(frozen=True, slots=True)
class Calibration:
    """What jobs took of their estimates, by the size of these.

    Between the knots it is straight on a double logarithmic scale; neither line ever falls.
    """

    estimates: tuple[float, ...]
    p50: tuple[float, ...]
    p90: tuple[float, ...]

    @classmethod
    def of(cls, lessons: Sequence[Ended]) -> Calibration:
        """What jobs teach, in the order in which they ended."""
        looks: defaultdict[int, list[Ended]] = defaultdict(list)
        for each in lessons:
            if each.estimate_s is not None:
                looks[int(each.due_s / LOOK_S)].append(each)
        scores = sorted(
            _Score(max(each.estimate_s or 0.0, LEAST_S), each.took_s, len(look) ** -0.5)
            for look in looks.values()
            for each in look
        )
        groups = _groups(scores)
        margin = math.exp(_moved(looks.values()))
        p50 = [middle * quantile(ratios, P50) for middle, ratios in groups]
        p90 = [middle * quantile(ratios, P90) * margin for middle, ratios in groups]
        late = _rising([max(pair) for pair in zip(p50, p90, strict=True)])
        return cls(tuple(middle for middle, _ in groups), _rising(p50), late)

    def at(self, estimate_s: float) -> tuple[float, float]:
        """p50 and p90 of a job with this estimate."""
        return self._on(self.p50, estimate_s), self._on(self.p90, estimate_s)

    def _on(self, line: tuple[float, ...], estimate_s: float) -> float:
        knots, place = self.estimates, bisect_right(self.estimates, estimate_s)
        if place == 0:
            return line[0] * estimate_s / knots[0]
        if place == len(knots):
            return line[-1] * estimate_s / knots[-1]
        left, right = knots[place - 1], knots[place]
        share = math.log(estimate_s / left) / math.log(right / left)
        return float(line[place - 1] ** (1 - share) * line[place] ** share)


class _Score(NamedTuple):
    estimate_s: float
    took_s: float
    weight: float


def _groups(scores: Sequence[_Score]) -> list[tuple[float, list[tuple[float, float]]]]:
    """Scores in the order of their estimates, in groups of one weight: the estimate in its middle,
    and what was taken of it with its weight, in order."""
    total = sum(score.weight for score in scores)
    num = max(1, min(MOST_GROUPS, int(total / GROUP)))
    pieces: list[list[_Score]] = [[] for _ in range(num)]
    before = 0.0
    for score in scores:
        pieces[min(num - 1, int(num * before / total))].append(score)
        before += score.weight
    return [_with_unseen(piece) for piece in pieces if piece or not scores]


def _with_unseen(piece: Sequence[_Score]) -> tuple[float, list[tuple[float, float]]]:
    lacking = max(0.0, 1 - sum(score.weight for score in piece) / (2 * GROUP))
    ratios = [(score.took_s / score.estimate_s, score.weight) for score in piece]
    middle = piece[len(piece) // 2].estimate_s if piece else 1.0
    return middle, sorted(ratios + [(ratio, lacking) for ratio in UNSEEN])


def _moved(looks: Iterable[Sequence[Ended]]) -> float:
    """How far p90 is moved, as a logarithm, after these promises."""
    margin = 0.0
    for look in looks:
        if late := [not each.is_kept for each in look if each.p90_s is not None]:
            margin += STEP * len(late) ** 0.5 * (fmean(late) - (1 - P90)) / P90
            margin = max(-MOST_MOVED, min(MOST_MOVED, margin))
    return margin


def quantile(ordered: Sequence[tuple[float, float]], level: float) -> float:
    """The value up to which this share of the weight lies, of values with their weights."""
    goal = level * sum(weight for _, weight in ordered)
    for value, weight in ordered:
        goal -= weight
        if goal <= 0:
            return value
    return ordered[-1][0]


def _rising(values: Sequence[float]) -> tuple[float, ...]:
    risen: list[float] = []
    for value in values:
        risen.append(max(value, risen[-1] if risen else value))
    return tuple(risen)
