"""When a job will have ended: measured pace, and what estimates were worth so far. Pure.

    estimate = what is ahead of it / what is drained a second + its own time in the engine
    p50, p90 = the estimate × what earlier jobs with such estimates took of theirs (`Calibration`)

What is drained is measured while jobs wait, so that an idle hour says nothing of a busy one, and in
work: device time by the job and by the token, as fitted to jobs that ended, so that a long job
ahead counts for more than a short one.

Times are in seconds. Work is in seconds of the device, or in jobs where no device is measured.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from app.books.calibration import LEAST_S, LOOK_S, P90, Calibration, Ended, quantile
from app.books.work import NOTHING, ONE_EACH, Size, Weights, fit

HALF_LIFE_S: Final = 600.0
"""After so long a measurement counts half: workers get slower, and prompts longer."""

PATIENT_SHARE: Final = 1 / 16
"""The least part of what is drained that a job gets, however much is more urgent: see
`app.broker.queues`."""

NANO_S: Final = 1e-9

OF_A_LOOK: Final = 8
"""Jobs of a look that are kept as lessons."""
LESSONS: Final = 1_500
RECENT: Final = 300
"""Jobs that ended last, which the pace is taken from."""

PATIENCE_S: Final = 600.0
LATE_LOAD: Final = 3.0
"""A load that has taken so long, and so many times the longest, has failed."""


@dataclass(frozen=True, slots=True)
class Eta:
    """Seconds from now, or from the time that a job is due."""

    start_p50_s: float
    start_p90_s: float
    p50_s: float
    p90_s: float


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
