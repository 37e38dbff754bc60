"""Who goes into the engine next. Decides, and neither writes nor runs nor tells anybody.

Jobs that were inside an engine when it was lost, or were lost with their workers, go first and
apart from all others (`suspects`); the rest goes in batches (`batcher`), as far as the engine has
room and, since memory once ran out, as far as is known to fit (`ceilings`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from app.jobs import CloseReason, new_id
from app.worker.batcher import Batcher, Capacity
from app.worker.engine.ceilings import Ceilings
from app.worker.suspects import Suspects
from app.worker.work import Batch, Job

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Room:
    """What the engine of a model would take now, in sequences."""

    rows: int
    inside: int
    joins: bool  #: it is running, and admits more between steps


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Jobs that are to run together."""

    jobs: list[Job]
    batch: Batch | None  #: None: they are claimed already


class Dispatcher:
    """Owns the jobs that wait for the engine, and what was learned of its memory."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._suspects = Suspects(batcher.limits)
        self._ceilings = Ceilings()
        self._waiting: dict[UUID, Job] = {}  #: in the batcher
        self._runs_apart = False  #: what is inside the engine now must stay alone

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def runs_apart(self) -> bool:
        return self._runs_apart

    def add(self, job: Job) -> None:
        if job.is_suspect:
            self._suspects.add(job)
        else:
            self._waiting[job.id] = job
            self._batcher.add(job.candidate())

    def remove(self, job_id: UUID) -> None:
        """Forget a job that is not claimed."""
        self._batcher.remove(job_id)
        self._suspects.remove(job_id)
        self._waiting.pop(job_id, None)

    def misfits(self, rooms: Mapping[str, Room]) -> list[tuple[Job, int]]:
        """Take out the jobs that their engine will never take, however empty; with the most
        sequences that it takes."""
        found = [] if _is_busy(rooms) else self._suspects.misfits(_rows(rooms))
        for model, capacity in self._capacities(rooms).items():
            misfits = self._batcher.misfits(model, capacity)
            found += [self._waiting.pop(misfit.job_id) for misfit in misfits]
        limits = self._batcher.limits
        return [
            (job, min(limits[job.model].max_batch_size, rooms[job.model].rows)) for job in found
        ]

    def next(self, rooms: Mapping[str, Room], now_ns: int) -> Dispatch | None:
        """Take out those that go in now; None if nobody does. To be asked until it says so."""
        self._runs_apart = self._runs_apart and _is_busy(rooms)
        if self._suspects and not _is_busy(rooms):
            return self._next_suspects(rooms, now_ns)
        for model, capacity in self._capacities(rooms).items():
            if closed := self._batcher.close(model, capacity, now_ns):
                jobs = [self._waiting.pop(member.job_id) for member in closed.members]
                batch = Batch(new_id(), model, closed.reason, closed.wait_ns)
                return _dispatch(jobs, batch, now_ns)
        return None

    def _next_suspects(self, rooms: Mapping[str, Room], now_ns: int) -> Dispatch | None:
        """The next group that runs apart: one that is claimed already, or else one to claim."""
        self._runs_apart = True
        if group := self._suspects.next_claimed(_rows(rooms)):
            return Dispatch(group, None)
        if not (jobs := self._suspects.next_unclaimed(_rows(rooms))):
            return None
        wait_ns = now_ns - min(job.arrived_ns for job in jobs)
        return _dispatch(jobs, Batch(new_id(), jobs[0].model, CloseReason.WAIT, wait_ns), now_ns)

    def next_close_ns(self, rooms: Mapping[str, Room]) -> int | None:
        """When the first batch closes by waiting, or None if none does."""
        return self._batcher.next_close_ns(self._capacities(rooms))

    def _capacities(self, rooms: Mapping[str, Room]) -> dict[str, Capacity]:
        """What each model's engine would take now; models that take nothing are left out, and all
        are while suspects run or wait: nobody else is to be beside them."""
        if self._suspects or self._runs_apart:
            return {}
        return {
            model: Capacity(
                room.rows, room.joins, self._ceilings.room(model, room.inside), room.inside == 0
            )
            for model, room in rooms.items()
            if room.rows > 0
        }

    # ── what the engine teaches ──────────────────────────────────────────────────────────────

    def put_back(self, dropped: Sequence[Job]) -> None:
        """Claimed jobs that the engine dropped: they run again apart, in halves, and come next."""
        self._suspects.split(dropped)

    def note_fitted(self, job: Job) -> None:
        self._ceilings.fitted(job.model, job.max_tokens, job.num_sequences)

    def note_overflow(self, dropped: Sequence[Job]) -> None:
        """Memory ran out with these inside: smaller batches follow."""
        for model in dict.fromkeys(job.model for job in dropped):
            jobs = [job for job in dropped if job.model == model]
            rows, tokens = sum(j.num_sequences for j in jobs), max(j.max_tokens for j in jobs)
            fits = self._ceilings.overflowed(model, tokens, rows)
            sentence = "Out of memory at %d rows of up to %d tokens; from now on at most %d."
            log.warning(sentence, rows, tokens, fits, extra={"action": "rows_halved"})


def _dispatch(jobs: list[Job], batch: Batch, now_ns: int) -> Dispatch:
    for job in jobs:
        job.closed_ns = now_ns
    return Dispatch(jobs, batch)


def _is_busy(rooms: Mapping[str, Room]) -> bool:
    return any(room.inside for room in rooms.values())


def _rows(rooms: Mapping[str, Room]) -> dict[str, int]:
    return {model: room.rows for model, room in rooms.items()}
