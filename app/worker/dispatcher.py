"""Who goes into the engine next. Decides, and neither writes nor runs nor tells anybody.

Jobs that were inside an engine when it was lost, or were lost with their workers, go first and
apart from all others (`suspects`); the rest goes in batches (`batcher`), as far as the engine has
room and, since memory once ran out, as far as is known to fit (`ceilings`).

A batch is claimed, and goes in when there is room. While an engine runs that nobody can join, the
next full batch is claimed already and lies ready in the engine process, so that the device waits
for nobody. For an engine that is joined some more are claimed than it has room for, so that a row
that becomes free waits for nobody, and one claim is for many. What is claimed early has no part in
what becomes of those that run. Whoever comes later waits for it, however urgent, so it is claimed
early only where it begins soon.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID

from app.jobs import CloseReason, new_id
from app.worker.batcher import Batcher, Candidate, Capacity, fill
from app.worker.engine.ceilings import Ceilings
from app.worker.suspects import Suspects
from app.worker.work import Batch, Job, Take

log = logging.getLogger(__name__)

SOON_NS: Final = 2_000_000_000
"""What longer batches lose to Postgres between them is next to nothing."""
AHEAD: Final = 8
"""One part in so many of an engine's rows may be claimed before there is room."""


@dataclass(frozen=True, slots=True)
class Room:
    """What the engine of a model would take now, in sequences."""

    rows: int
    inside: int
    joins: bool  #: it admits more between its steps
    most: int  #: what it takes when it is empty
    has_waiting: bool  #: a batch lies ready there


@dataclass(frozen=True, slots=True)
class Closed:
    """A batch that is to be claimed."""

    batch: Batch
    jobs: list[Job]


class Dispatcher:
    """Owns the jobs that wait for the engine, and what was learned of its memory."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._suspects = Suspects(batcher.limits)
        self._ceilings = Ceilings()
        self._waiting: dict[UUID, Job] = {}  #: in the batcher
        self._claimed: dict[str, list[Job]] = {}  #: by model, those that go in next
        self._lasted_ns: dict[str, int] = {}  #: by model, what its last job took in the engine
        self._runs_apart = False  #: what is inside the engine now must stay alone

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def runs_apart(self) -> bool:
        return self._runs_apart

    @property
    def has_suspects(self) -> bool:
        """Whether suspects wait, claimed or not."""
        return bool(self._suspects)

    @property
    def has_claimed(self) -> bool:
        """Whether claimed jobs wait for room."""
        return any(self._claimed.values())

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
        most = {
            model: min(limits[model].max_batch_size, room.most) for model, room in rooms.items()
        }
        claimed = [job for model in rooms for job in self._claimed.get(model, [])]
        for job in claimed:  # it was taken, and nobody had read it before
            if job.num_sequences > most[job.model]:
                self.withdraw(job)
                found.append(job)
        return [(job, most[job.model]) for job in found]

    def close(self, rooms: Mapping[str, Room], now_ns: int) -> Closed | None:
        """Take out a batch that is to be claimed now; None if there is none such. To be asked until
        it says so."""
        if self._suspects:
            return None if _is_busy(rooms) else self._close_suspects(rooms, now_ns)
        for model, capacity in self._claimable(rooms).items():
            if closed := self._batcher.close(model, capacity, now_ns):
                jobs = [self._waiting.pop(member.job_id) for member in closed.members]
                batch = Batch(new_id(), model, closed.reason, closed.wait_ns)
                return _closed(batch, jobs, now_ns)
        return None

    def foresee(
        self, came: Mapping[str, Collection[Candidate]], rooms: Mapping[str, Room], now_ns: int
    ) -> Take | None:
        """A batch that would close at once, full, of those that came, by model, if they were added;
        None if there is none such. To be asked until it says so."""
        for model, capacity in self._claimable(rooms).items():
            if full := self._batcher.foresee(model, came.get(model, ()), capacity, now_ns):
                batch = Batch(new_id(), model, full.reason, full.wait_ns)
                return Take(batch, {member.job_id: new_id() for member in full.members})
        return None

    def _close_suspects(self, rooms: Mapping[str, Room], now_ns: int) -> Closed | None:
        if not (jobs := self._suspects.next_unclaimed(_rows(rooms))):
            return None
        wait_ns = now_ns - min(job.arrived_ns for job in jobs)
        return _closed(Batch(new_id(), jobs[0].model, CloseReason.WAIT, wait_ns), jobs, now_ns)

    def add_claimed(self, jobs: list[Job]) -> None:
        """A batch that was claimed: it goes in as soon as there is room."""
        if jobs and jobs[0].is_suspect:
            self._suspects.add_claimed(jobs)
        elif jobs:
            self._claimed[jobs[0].model] = [*self._claimed.get(jobs[0].model, []), *jobs]

    def next_claimed(self, rooms: Mapping[str, Room]) -> list[Job] | None:
        """Take out claimed jobs that go in now; None if there are none such. To be asked until it
        says so."""
        self._runs_apart = self._runs_apart and _is_busy(rooms)
        if self._suspects:
            if _is_busy(rooms) or not (group := self._suspects.next_claimed(_rows(rooms))):
                return None
            self._runs_apart = True
            return group
        for model, capacity in self._capacities(rooms).items():
            if members := self._take_fitting(model, capacity):
                return members
        return None

    def _take_fitting(self, model: str, capacity: Capacity) -> list[Job]:
        """As many of a claimed batch as fit: memory may have run out since its claim, and what was
        taken had not been read before."""
        claimed = self._claimed.pop(model, [])
        candidates = [job.candidate() for job in claimed]
        limits = self._batcher.limits[model]
        most = min(limits.max_batch_size, capacity.free_rows)
        members, _ = fill(candidates, most, limits.max_batch_tokens, capacity)
        if rest := claimed[len(members) :]:
            self._claimed[model] = rest
        return claimed[: len(members)]

    def withdraw(self, job: Job) -> bool:
        """Take out a claimed job; returns whether it waits here."""
        claimed = self._claimed.get(job.model, [])
        if job not in claimed:
            return self._suspects.withdraw(job)
        claimed.remove(job)
        return True

    def next_close_ns(self, rooms: Mapping[str, Room]) -> int | None:
        """When the first batch closes by waiting, or None if none does."""
        return self._batcher.next_close_ns(self._claimable(rooms))

    def _claimable(self, rooms: Mapping[str, Room]) -> dict[str, Capacity]:
        """What each model's engine would take now, and in a moment if it is joined; without models
        of which something is claimed already."""
        open_rooms = {
            model: self._with_ahead(model, room)
            for model, room in rooms.items()
            if not self._claimed.get(model)
        }
        return self._capacities(open_rooms)

    def _with_ahead(self, model: str, room: Room) -> Room:
        """The last one of those that are claimed ahead begins when so many others have ended."""
        ahead = max(1, room.most // AHEAD)
        begins_ns = self._lasted_ns.get(model, SOON_NS * room.most) * ahead / room.most
        if not (room.joins and room.inside and begins_ns < SOON_NS):
            return room
        return replace(room, rows=room.rows + ahead)

    def _capacities(self, rooms: Mapping[str, Room]) -> dict[str, Capacity]:
        """What each model's engine would take now, or when it is free again; models that are to
        take nothing are left out, and all are while suspects run or wait: nobody else is to be
        beside them."""
        if self._suspects or self._runs_apart:
            return {}
        capacities = {
            model: Capacity(
                room.rows, room.joins, self._ceilings.room(model, room.inside), room.inside == 0
            )
            for model, room in rooms.items()
            if room.rows > 0
        }
        ahead = {
            model: Capacity(room.most, ceiling=self._ceilings.room(model, 0), is_ahead=True)
            for model, room in rooms.items()
            if room.rows == 0 and self._is_fed_ahead(model, room)
        }
        return capacities | ahead

    def _is_fed_ahead(self, model: str, room: Room) -> bool:
        is_soon = self._lasted_ns.get(model, SOON_NS) < SOON_NS
        return is_soon and not room.joins and not room.has_waiting

    # ── what the engine teaches ──────────────────────────────────────────────────────────────

    def put_back(self, dropped: Sequence[Job]) -> None:
        """Claimed jobs that the engine dropped: they run again apart, in halves, and come next."""
        self._suspects.split(dropped)

    def note_ran(self, job: Job) -> None:
        """The engine has answered it."""
        self._lasted_ns[job.model] = job.claimed_run.lasted_ns
        self._ceilings.fitted(job.model, job.max_tokens, job.num_sequences)

    def note_batch(self, batch: Batch) -> None:
        """The engine has answered all of it that was inside; the rest may wait for room."""
        if any(job.claimed_run.batch is batch for job in self._claimed.get(batch.model, ())):
            return
        self._batcher.note_ran(batch.model, batch.num_sequences, batch.device_ns)

    def note_overflow(self, dropped: Sequence[Job]) -> None:
        """Memory ran out with these inside: smaller batches follow."""
        for model in dict.fromkeys(job.model for job in dropped):
            jobs = [job for job in dropped if job.model == model]
            rows, tokens = sum(j.num_sequences for j in jobs), max(j.max_tokens for j in jobs)
            fits = self._ceilings.overflowed(model, tokens, rows)
            sentence = "Out of memory at %d rows of up to %d tokens; from now on at most %d."
            log.warning(sentence, rows, tokens, fits, extra={"action": "rows_halved"})


def _closed(batch: Batch, jobs: list[Job], now_ns: int) -> Closed:
    for job in jobs:
        job.closed_ns = now_ns
    return Closed(batch, jobs)


def _is_busy(rooms: Mapping[str, Room]) -> bool:
    return any(room.inside for room in rooms.values())


def _rows(rooms: Mapping[str, Room]) -> dict[str, int]:
    return {model: room.rows for model, room in rooms.items()}
