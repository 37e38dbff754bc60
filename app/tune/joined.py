"""A trace through an engine whose sequences join and leave between its steps. Pure.

A step of n sequences takes a + b·n and gives each its next token; prompts take no time of their
own. Jobs go in as they came, as soon as there are rows for all of their sequences.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

from app.tune.replay import Arrival, Outcome
from app.worker.policy import StepCost


def replay_joined(trace: Sequence[Arrival], rows: int, step: StepCost) -> Outcome:
    """Run the jobs of a trace, each of `output_tokens` steps, with at most `rows` sequences inside.

    `sizes` of the outcome are the sequences inside when a job ends, one for each job.
    """
    waiting: deque[Arrival] = deque()
    ends: list[tuple[float, int, Arrival]] = []  #: by the step after which a job is over
    outcome, place, inside, number = Outcome(), 0, 0, 0
    now_ns = steps = busy_ns = 0.0
    while place < len(trace) or ends:
        over_ns = now_ns + (ends[0][0] - steps) * step.of(inside) if ends else None
        came_ns = float(trace[place].at_ns) if place < len(trace) else None
        at_ns = max(now_ns, min(ns for ns in (over_ns, came_ns) if ns is not None))
        if ends:
            busy_ns += at_ns - now_ns
            is_end = over_ns is not None and over_ns <= at_ns
            steps = ends[0][0] if is_end else steps + (at_ns - now_ns) / step.of(inside)
        now_ns = at_ns
        while place < len(trace) and trace[place].at_ns <= now_ns:
            waiting.append(trace[place])
            place += 1
        while ends and ends[0][0] <= steps:
            job = heapq.heappop(ends)[2]
            outcome.latencies_ns.append(round(now_ns) - job.at_ns)
            outcome.sizes.append(inside)
            inside -= min(job.rows, rows)
        while waiting and inside + min(waiting[0].rows, rows) <= rows:
            job = waiting.popleft()
            inside += min(job.rows, rows)
            number += 1  # so that no two are alike
            heapq.heappush(ends, (steps + max(1, job.output_tokens), number, job))
    outcome.device_ns, outcome.ended_ns = round(busy_ns), round(now_ns)
    return outcome


def step(rows: int, tokens: int, lasted_ns: int, device_ns: int) -> tuple[float, float] | None:
    """(sequences inside, ns of a step) that a job of `rows` sequences has seen on average, from
    its tokens, how long it was inside, and its share of the device; None if it says nothing."""
    if tokens < rows or lasted_ns <= 0 or not 0 < device_ns <= lasted_ns:
        return None
    return rows * lasted_ns / device_ns, lasted_ns * rows / tokens
