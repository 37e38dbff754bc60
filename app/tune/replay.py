"""A trace through the worker's own batcher, on a simulated clock and device. Pure.

The device runs one batch at a time, as an engine does that nobody can join: a + b·n for n
sequences. As in a worker, the next full batch lies ready while one runs, and begins the moment the
other is over. What Redis, Postgres and the processes add is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from app.jobs import CloseReason
from app.worker.batcher import Batcher, Candidate, Capacity, Limits, Selection
from app.worker.dispatcher import SOON_NS
from app.worker.policy import StepCost

GROUP: Final = "model"


@dataclass(frozen=True, slots=True)
class Arrival:
    """A job of a trace."""

    at_ns: int  #: from the trace's begin
    rows: int = 1  #: sequences
    prompt_tokens: int = 0  #: of its longest prompt
    output_tokens: int = 0  #: that it may have at most


@dataclass(slots=True)
class Outcome:
    """What became of a trace under one setting."""

    latencies_ns: list[int] = field(default_factory=list)  #: of jobs, in order of their ends
    waits_ns: list[int] = field(default_factory=list)  #: of batches: of their oldest member
    sizes: list[int] = field(default_factory=list)  #: of batches, in sequences
    reasons: list[CloseReason] = field(default_factory=list)
    device_ns: int = 0  #: that batches took
    ended_ns: int = 0  #: the last of them, from the trace's begin

    def latency_ns(self, share: float) -> int:
        """What this share of the jobs stayed at or below."""
        ordered = sorted(self.latencies_ns)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    @property
    def mean_latency_ns(self) -> float:
        return sum(self.latencies_ns) / len(self.latencies_ns)


def replay(trace: Sequence[Arrival], limits: Limits, cost: StepCost) -> Outcome:
    """Run the jobs of a trace, which is in order of time and holds at least one."""
    return _Replay(trace, limits, cost).run()


class _Replay:
    def __init__(self, trace: Sequence[Arrival], limits: Limits, cost: StepCost) -> None:
        self._trace, self._limits, self._cost = trace, limits, cost
        self._batcher = Batcher({GROUP: limits})
        self._free = Capacity(limits.max_batch_size)
        self._ahead = Capacity(limits.max_batch_size, is_ahead=True)
        self._runs: Selection | None = None
        self._next: Selection | None = None  #: lies ready
        self._over_ns = 0  #: when what runs is over
        self._outcome = Outcome()

    def run(self) -> Outcome:
        place, now_ns = 0, 0
        while place < len(self._trace) or self._runs or len(self._batcher):
            arrives_ns = self._trace[place].at_ns if place < len(self._trace) else None
            now_ns = max(now_ns, self._next_ns(arrives_ns))
            while place < len(self._trace) and self._trace[place].at_ns <= now_ns:
                self._batcher.add(_candidate(place, self._trace[place], self._limits))
                place += 1
            if self._runs and now_ns >= self._over_ns:
                self._end(self._runs)
            self._begin(now_ns)
        return self._outcome

    def _next_ns(self, arrives_ns: int | None) -> int:
        """When something happens next."""
        if self._runs:
            closes_ns: int | None = self._over_ns
        else:
            closes_ns = self._batcher.next_close_ns({GROUP: self._free})
        return min(ns for ns in (arrives_ns, closes_ns) if ns is not None)

    def _end(self, batch: Selection) -> None:
        outcome, took_ns = self._outcome, round(self._cost.of(batch.num_sequences))
        self._batcher.note_ran(GROUP, batch.num_sequences, took_ns)
        outcome.latencies_ns += [self._over_ns - each.arrived_ns for each in batch.members]
        outcome.waits_ns.append(batch.wait_ns)
        outcome.sizes.append(batch.num_sequences)
        outcome.reasons.append(batch.reason)
        outcome.device_ns += took_ns
        outcome.ended_ns = self._over_ns
        self._runs = None

    def _begin(self, now_ns: int) -> None:
        if self._runs is None:
            self._runs = self._next or self._batcher.close(GROUP, self._free, now_ns)
            self._next = None
            if self._runs is None:
                return
            self._over_ns = now_ns + round(self._cost.of(self._runs.num_sequences))
        if self._next is None and self._cost.of(self._runs.num_sequences) < SOON_NS:
            self._next = self._batcher.close(GROUP, self._ahead, now_ns)


def _candidate(place: int, job: Arrival, limits: Limits) -> Candidate:
    return Candidate(
        job_id=UUID(int=place),
        group=GROUP,
        num_sequences=min(job.rows, limits.max_batch_size),
        prompt_tokens=job.prompt_tokens,
        max_new_tokens=job.output_tokens,
        arrived_ns=job.at_ns,
    )
