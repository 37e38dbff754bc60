"""Jobs that run apart from healthy work, because one of them may kill what runs it.

Two kinds wait here. Groups that were inside an engine when it died or ran out of memory: they are
claimed, and run again by halves, so that of B jobs one guilty job is alone after at most
2 × ceil(log2 B) + 1 runs, the first included. And jobs that were lost with their workers before:
they are claimed when their turn comes, in groups that grow smaller with every loss.

The runner lets a group in when the engine is empty, and nothing else until it is empty again. So
only a group's own members can be guilty of its end, and a job that was alone is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Final
from uuid import UUID

from app.errors import EngineCrashed, OutOfMemory
from app.jobs import max_company
from app.worker.batcher import Limits, fill
from app.worker.engine.wire import Broken
from app.worker.work import Ending, Job, Run

KILLS_ALONE: Final = 3
"""Runs alone that a job is given when it may be innocent all the same: somebody else killed the
engine process, or it showed no progress in time. A crash or an error of its own counts at once."""


class Suspects:
    """Owns the jobs that wait to be run apart."""

    def __init__(self, limits: dict[str, Limits]) -> None:
        """`limits` has an entry for each served model."""
        self._limits = limits
        self._claimed: deque[list[Job]] = deque()
        self._unclaimed: dict[UUID, Job] = {}

    def __bool__(self) -> bool:
        return bool(self._claimed or self._unclaimed)

    def add(self, job: Job) -> None:
        """A job that was lost with its workers, and is not claimed here yet."""
        self._unclaimed[job.id] = job

    def remove(self, job_id: UUID) -> None:
        self._unclaimed.pop(job_id, None)

    def add_claimed(self, group: Sequence[Job]) -> None:
        """Jobs that were claimed just now: they come next."""
        self._claimed.appendleft([*group])

    def withdraw(self, job: Job) -> bool:
        """Take out a claimed job; returns whether it waits here."""
        found = any(job in group for group in self._claimed)
        rest = ([each for each in group if each is not job] for group in self._claimed)
        self._claimed = deque(group for group in rest if group)
        return found

    def split(self, dropped: Sequence[Job]) -> None:
        """Put back jobs that an engine dropped: by model, or else in halves. They come next."""
        groups = [
            [job for job in dropped if job.model == model]
            for model in dict.fromkeys(job.model for job in dropped)
        ]
        if len(groups) == 1:
            middle = (len(dropped) + 1) // 2
            groups = [half for half in (groups[0][:middle], groups[0][middle:]) if half]
        self._claimed.extendleft(reversed(groups))

    def misfits(self, max_rows: Mapping[str, int]) -> list[Job]:
        """Take out the jobs that have more sequences than an empty engine takes, by model."""
        waiting = [*self._unclaimed.values(), *chain.from_iterable(self._claimed)]
        found = [job for job in waiting if job.num_sequences > self._most(job.model, max_rows)]
        for job in found:
            self._unclaimed.pop(job.id, None)
        rest = ([job for job in group if job not in found] for group in self._claimed)
        self._claimed = deque(group for group in rest if group)
        return found

    def next_claimed(self, max_rows: Mapping[str, int]) -> list[Job] | None:
        """The next group that is claimed already, or the part of it that fits."""
        if not self._claimed:
            return None
        group = self._claimed.popleft()
        members = self._fitting(group, max_rows)
        if rest := group[len(members) :]:
            self._claimed.appendleft(rest)
        return members

    def next_unclaimed(self, max_rows: Mapping[str, int]) -> list[Job]:
        """Take out the next group to be claimed: of one model, and as small as its losses ask."""
        if not self._unclaimed:
            return []
        model = next(iter(self._unclaimed.values())).model
        ours = [job for job in self._unclaimed.values() if job.model == model]
        company = max_company(max(job.losses for job in ours[: max_company(0)]))
        members = self._fitting(ours[:company], max_rows)
        for job in members:
            del self._unclaimed[job.id]
        return members

    def _most(self, model: str, max_rows: Mapping[str, int]) -> int:
        return min(self._limits[model].max_batch_size, max_rows[model])

    def _fitting(self, group: Sequence[Job], max_rows: Mapping[str, int]) -> list[Job]:
        """The first jobs of a group that run together; all of it without `misfits`, or some."""
        model = group[0].model
        wanted = [job.candidate() for job in group]
        most, max_tokens = self._most(model, max_rows), self._limits[model].max_batch_tokens
        members, _ = fill(wanted, most, max_tokens)
        return list(group[: len(members)])


def verdict(run: Run, broken: Broken) -> Ending | None:
    """How a job ends that was alone when its engine process died; None if it is to run again."""
    run.deaths_alone += 1
    if run.deaths_alone < (KILLS_ALONE if broken.may_be_innocent else 1):
        return None
    times = "once" if run.deaths == 1 else f"{run.deaths} times"
    alone = "alone" if run.deaths == run.deaths_alone else f"{run.deaths_alone} of them alone"
    evidence = f"The engine process was lost {times} while it ran this job, {alone}: "
    error = OutOfMemory if broken.was_killed else EngineCrashed
    return Ending.failed(error(evidence + f"{broken.reason}."))
