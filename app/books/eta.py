"""When a job will have ended: measured pace, and what estimates were worth so far. Pure.

    estimate = what is ahead of it / what is drained a second + its own time in the engine
    p50, p90 = the estimate × what earlier jobs with such estimates took of theirs

What is drained is measured while jobs wait, so that an idle hour says nothing of a busy one, and in
work: device time by the job and by the token, as fitted to jobs that ended, so that a long job
ahead counts for more than a short one.

The second line is split conformal prediction (Vovk et al., 2005; Lei et al., 2018): whatever is
wrong with the first line, if it is the same for later jobs as for earlier ones, nine of ten end
within their p90. Estimates of different sizes err differently, so each is compared with others of
its size. Jobs that were told at the same time err together, so many of them count for less than as
many. Where the errors drift, p90 is moved with each job that is late or in time, so that in the
long run one in ten is late whatever happens (conformal PID control: Angelopoulos et al., 2023).

Times are in seconds. Work is in seconds of the device, or in jobs where no device is measured.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Final, NamedTuple
from uuid import UUID

HALF_LIFE_S: Final = 600.0
"""After so long a measurement counts half: workers get slower, and prompts longer."""

PATIENT_SHARE: Final = 1 / 16
"""The least part of what is drained that a job gets, however much is more urgent: see
`app.broker.queues`."""

LEAST_S: Final = 1e-3
"""No time is told to be shorter."""

NANO_S: Final = 1e-9

P50: Final = 0.5
P90: Final = 0.9

LOOK_S: Final = 1.0
"""Jobs that come within so long are told from one look at the queue, and err together. Those of a
look count as much as the root of their number."""
OF_A_LOOK: Final = 8
"""Jobs of a look that are kept as lessons."""
LESSONS: Final = 1_500
RECENT: Final = 300
"""Jobs that ended last, which the pace is taken from."""

GROUP: Final = 15.0
"""Weight of the lessons that a quantile is taken of, at least."""
MOST_GROUPS: Final = 6
UNSEEN: Final = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.5)
"""What jobs are taken to need of their estimates as long as few lessons tell."""

PATIENCE_S: Final = 600.0
LATE_LOAD: Final = 3.0
"""A load that has taken so long, and so many times the longest, has failed."""

STEP: Final = 0.1
"""How far p90 is moved by a late job that comes alone, as a logarithm; by one in time a ninth."""
MOST_MOVED: Final = 0.8


@dataclass(frozen=True, slots=True)
class Size:
    """How much one or more jobs ask for."""

    jobs: float = 0.0
    input_tokens: float = 0.0
    output_tokens: float = 0.0  #: to be generated; of jobs that wait, as many as are likely

    def __add__(self, other: Size) -> Size:
        return Size(
            self.jobs + other.jobs,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
        )

    def times(self, factor: float) -> Size:
        return Size(self.jobs * factor, self.input_tokens * factor, self.output_tokens * factor)

    def with_output(self, share: float) -> Size:
        """The same with this share of the output."""
        return Size(self.jobs, self.input_tokens, self.output_tokens * share)


NOTHING: Final = Size()


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
class Weights:
    """Some cost of a job as a sum of its parts, none of them negative."""

    per_job: float = 0.0
    per_input_token: float = 0.0
    per_output_token: float = 0.0

    def of(self, size: Size) -> float:
        return (
            self.per_job * size.jobs
            + self.per_input_token * size.input_tokens
            + self.per_output_token * size.output_tokens
        )


ONE_EACH: Final = Weights(per_job=1.0)


def fit(sizes: Sequence[Size], costs: Sequence[float]) -> Weights:
    """Weights without a negative one whose costs of these sizes are nearest to `costs`.

    Non-negative least squares: with three weights each subset of them is solved, and the best one
    without a negative weight is taken. All are 0 if all costs are.
    """
    rows = [(size.jobs, size.input_tokens, size.output_tokens) for size in sizes]
    squares = [[sum(row[i] * row[j] for row in rows) for j in range(3)] for i in range(3)]
    target = [sum(row[i] * cost for row, cost in zip(rows, costs, strict=True)) for i in range(3)]
    best, least = (0.0, 0.0, 0.0), 0.0
    for chosen in (each for n in (1, 2, 3) for each in combinations(range(3), n)):
        found = _solved(
            [[squares[i][j] for j in chosen] for i in chosen], [target[i] for i in chosen]
        )
        if found is None or min(found) < 0:
            continue
        # Of the sum of squared errors, what depends on the weights.
        loss = -sum(target[i] * weight for i, weight in zip(chosen, found, strict=True))
        if loss < least * (1 + 1e-9):
            least = loss
            weights = dict(zip(chosen, found, strict=True))
            best = (weights.get(0, 0.0), weights.get(1, 0.0), weights.get(2, 0.0))
    return Weights(*best)


def _solved(matrix: list[list[float]], right: list[float]) -> list[float] | None:
    """The solution of a small symmetric system; None if it has none that is sound."""
    size = len(right)
    rows = [[*line, value] for line, value in zip(matrix, right, strict=True)]
    for place in range(size):
        pivot = rows[place][place]
        if pivot <= 1e-9 * matrix[place][place] or not math.isfinite(pivot):
            return None
        for other in range(size):
            if other != place:
                factor = rows[other][place] / pivot
                rows[other] = [
                    a - factor * b for a, b in zip(rows[other], rows[place], strict=True)
                ]
    return [rows[place][size] / rows[place][place] for place in range(size)]


@dataclass(frozen=True, slots=True)
class Eta:
    """Seconds from now, or from the time that a job is due."""

    start_p50_s: float
    start_p90_s: float
    p50_s: float
    p90_s: float


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


@dataclass(frozen=True, slots=True)
class Start:
    """Workers of a model that are not up yet."""

    num_loading: int
    load_s: float | None  #: what the model takes to load, as far as that was measured
    left_s: float | None  #: until the first that loads now is likely to be up


def start_of(loads: Sequence[tuple[float, float | None]], now_s: float) -> Start:
    """What is known of starts, from when each load began and ended, newest first.

    One that has taken many times what others took has failed, and is not waited for.
    """
    took = sorted(max(0.0, end_s - began_s) for began_s, end_s in loads if end_s is not None)
    load_s = took[len(took) // 2] if took else None
    patience_s = max(PATIENCE_S, LATE_LOAD * (took[-1] if took else 0.0))
    ages = [now_s - began_s for began_s, end_s in loads if end_s is None]
    loading = [max(0.0, age_s) for age_s in ages if age_s < patience_s]
    left_s = None
    if loading and load_s is not None:
        left_s = max(0.0, load_s - max(loading))
    return Start(len(loading), load_s, left_s)


def _rising(values: Sequence[float]) -> tuple[float, ...]:
    risen: list[float] = []
    for value in values:
        risen.append(max(value, risen[-1] if risen else value))
    return tuple(risen)


@dataclass(frozen=True, slots=True)
class Ahead:
    """What a job has before it, at its model."""

    queued: Size
    running: Size
    urgent_a_second: Size = NOTHING  #: that comes and passes it by


@dataclass(frozen=True, slots=True)
class Pace:
    """What is known of a model from jobs that ended."""

    work: Weights
    own: Weights  #: seconds from the engine's start to the end
    mean_own_s: float
    drained_a_second: float  #: work, by one worker
    output_share: float  #: of the tokens that are allowed, those that are generated
    device: Weights | None  #: seconds of device time; None where none is measured
    device_spread: tuple[float, float]  #: what a tenth stay below, and nine tenths, of the fitted
    output_spread: tuple[float, float]  #: the same of the allowed tokens
    calibration: Calibration

    def likely(self, allowed: Size) -> Size:
        """What is likely to be asked for, of jobs with all the output that they are allowed."""
        return Size(allowed.jobs, allowed.input_tokens, allowed.output_tokens * self.output_share)

    def estimate_s(
        self,
        size: Size,
        ahead: Ahead,
        workers: int,
        places: int,
        due_in_s: float = 0.0,
        cold_s: float = 0.0,
    ) -> float:
        """Seconds to the end of a job from the time it is due, before calibration.

        `places` is how many jobs all workers together have in their engines; `cold_s` is how long
        the first of them is likely to load yet.
        """
        rate = self.drained_a_second * workers
        left = max(rate - self.work.of(ahead.urgent_a_second), rate * PATIENT_SHARE)
        wait_s = (self.work.of(ahead.queued) + self.work.of(ahead.running) / 2) / left
        if ahead.queued.jobs + ahead.running.jobs < places:
            wait_s = min(wait_s, self.mean_own_s)  # it is free when what runs is over
        return max(LEAST_S, max(0.0, cold_s + wait_s - due_in_s) + self.own.of(size))

    def eta(self, size: Size, estimate_s: float) -> Eta:
        p50_s, p90_s = self.calibration.at(estimate_s)
        own_s = self.own.of(size)
        return Eta(max(0.0, p50_s - own_s), max(0.0, p90_s - own_s), p50_s, p90_s)


def pace_of(
    recent: Sequence[Ended],
    lessons: Sequence[Ended],
    waiting: Sequence[tuple[float, float]],
    workers: Sequence[tuple[float, float]],
    now_s: float,
) -> Pace | None:
    """What jobs tell that ended last, and lessons from longer ago, both in that order; None if
    there are none.

    `waiting` says since when how many jobs wait; `workers` from when to when each was up.
    """
    if not recent:
        return None
    sizes = [each.size for each in recent]
    device_s = [each.device_s for each in recent]
    has_device = max(device_s) >= NANO_S
    work = fit(sizes, device_s) if has_device else ONE_EACH
    own_s = [each.own_s for each in recent]
    measured = drained(recent, waiting, workers, work, now_s)
    one_by_one = fmean(map(work.of, sizes)) / fmean(own_s)
    outputs = [
        each.size.output_tokens / each.max_output_tokens
        for each in recent
        if each.max_output_tokens
    ]
    of_fitted = [
        used / fitted
        for size, used in zip(sizes, device_s, strict=True)
        if (fitted := work.of(size)) > 0
    ]
    return Pace(
        work=work,
        own=fit(sizes, own_s),
        mean_own_s=fmean(own_s),
        drained_a_second=max(measured or 0.0, one_by_one),
        output_share=fmean(outputs) if outputs else 1.0,
        device=work if has_device else None,
        device_spread=_spread(of_fitted),
        output_spread=_spread(outputs),
        calibration=Calibration.of(lessons),
    )


def _spread(values: Iterable[float]) -> tuple[float, float]:
    """What a tenth of them do not exceed, and nine tenths."""
    ordered = [(value, 1.0) for value in sorted(values)] or [(1.0, 1.0)]
    return quantile(ordered, 1 - P90), quantile(ordered, P90)


def drained(
    recent: Sequence[Ended],
    waiting: Sequence[tuple[float, float]],
    workers: Sequence[tuple[float, float]],
    work: Weights,
    now_s: float,
) -> float | None:
    """Work that one worker does in a second while jobs wait; None if none ever waited.

    Each moment counts as much as jobs waited in it, and less the longer it is ago: full batches
    are made of queues, and what is asked is how queues drain.
    """
    events: list[tuple[float, float, float, float]] = []  # time; change of waiting, flow, workers
    for each in recent:
        flow = work.of(each.size) / each.own_s
        events.append((each.due_s, 1.0, 0.0, 0.0))
        events.append((max(each.started_s, each.due_s), -1.0, flow, 0.0))
        events.append((max(each.started_s, each.due_s) + each.own_s, 0.0, -flow, 0.0))
    events += [(since_s, jobs, 0.0, 0.0) for since_s, jobs in waiting]
    for start_s, end_s in workers:
        events += [(start_s, 0.0, 0.0, 1.0), (end_s, 0.0, 0.0, -1.0)]
    begin_s = min(each.started_s for each in recent)
    end_s = max(each.ended_s for each in recent)
    done = offered = queue = flow = up = 0.0
    at_s = begin_s
    for time_s, more, faster, joined in sorted(events):
        until_s = min(time_s, end_s)
        if until_s > at_s:
            age_s = max(0.0, now_s - (at_s + until_s) / 2)
            counts = max(0.0, queue) * (until_s - at_s) * 0.5 ** (age_s / HALF_LIFE_S)
            done += counts * max(0.0, flow)
            offered += counts * max(1.0, up)
            at_s = until_s
        queue, flow, up = queue + more, flow + faster, up + joined
    return done / offered if offered > 0 and done > 0 else None


class Experience:
    """The jobs of one model that ended, as far as they are kept."""

    def __init__(self) -> None:
        self._recent: deque[Ended] = deque(maxlen=RECENT)
        self._lessons: deque[Ended] = deque(maxlen=LESSONS)
        self._promised: deque[bool] = deque(maxlen=2 * LESSONS)  #: whether it was kept, of each
        self._of_look: Counter[int] = Counter()

    def add(self, ended: Iterable[Ended]) -> None:
        """Jobs that ended later than those before, in any order."""
        for each in sorted(ended, key=lambda each: each.ended_s):
            self._recent.append(each)
            if each.p90_s is not None:
                self._promised.append(each.is_kept)
            if each.estimate_s is not None:
                self._learn(each)

    def _learn(self, job: Ended) -> None:
        look = int(job.due_s / LOOK_S)
        self._of_look[look] += 1
        if self._of_look[look] <= OF_A_LOOK:
            self._lessons.append(job)
        if len(self._of_look) > LESSONS:
            del self._of_look[min(self._of_look)]

    def forget_pace(self) -> None:
        """Jobs are missing between those so far and the next: no rate is to be taken of both."""
        self._recent.clear()

    @property
    def num_promised(self) -> int:
        return len(self._promised)

    @property
    def share_kept(self) -> float | None:
        """Of the jobs that were promised an end, those that ended in time; None if there are
        none."""
        return fmean(self._promised) if self._promised else None

    def pace(
        self,
        waiting: Sequence[tuple[float, float]],
        workers: Sequence[tuple[float, float]],
        now_s: float,
    ) -> Pace | None:
        """See `pace_of`."""
        return pace_of(tuple(self._recent), tuple(self._lessons), waiting, workers, now_s)
