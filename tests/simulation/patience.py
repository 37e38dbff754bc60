"""How long a job may wait for its turn once all faults are over: nobody starves.

The bound is of the jobs that are there: what has to go before a job or be found out first. Jobs of
the other model are not among them, however many, but for those that end the engine of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from app.jobs import JobState
from tests.memory_store import MemoryDatabase, Row
from tests.simulation.broken import expect
from tests.simulation.engine import LOAD_NS, STEP_NS
from tests.simulation.prompts import Expected
from tests.simulation.settings import LEAST_ROWS, SETTINGS

_STEP_S: Final = STEP_NS / 1e9
_LOAD_S: Final = LOAD_NS / 1e9
_CLOSE_S: Final = 0.15  #: a batch waits for company, and for its turn

FIND_S: Final = 2 * SETTINGS.worker.lease_s
"""To find out what is lost with a worker, or to find a frozen engine and load the models."""

_RUNS: Final = 6  #: of a guilty job: in halves of a batch, and alone as often as is needed


def _cost_s(prompt: str) -> float:
    """What a job may take of everybody's time, if it ends the engine."""
    match prompt.split()[0]:
        case "hang":
            return _RUNS * (SETTINGS.worker.step_timeout_s + _LOAD_S)
        case "poison":
            return _RUNS * _LOAD_S
        case _:
            return 0.0


def _run_s(prompt: str) -> float:
    """What it takes of the time of its own model."""
    return _CLOSE_S + int(prompt.split()[1]) * _STEP_S


class Patience:
    """Who waits when the faults end, and for how long each may."""

    def __init__(self, store: MemoryDatabase, jobs: Mapping[UUID, Expected]) -> None:
        """`jobs` has all that were ever submitted."""
        self._store, self._since = store, store.now()
        rows = store.tables["jobs"]
        self._open = {
            id: each
            for id, each in jobs.items()
            if id not in rows or not JobState(rows[id]["state"]).is_final
        }
        self._waits = {
            id: rows.get(id) for id in self._open if id not in rows or rows[id]["state"] == "queued"
        }

    def waits_beside(self, busy: str) -> bool:
        """Whether a job of another model waits, and many of this one."""
        models = [self._open[id].model for id in self._waits]
        return len(models) - models.count(busy) in range(1, models.count(busy) // 4)

    def longest_s(self, job_id: UUID) -> float:
        """From the end of the faults, or from when the job is due, to its first claim."""
        model, row = self._open[job_id].model, self._waits[job_id]
        resent_s = SETTINGS.rescue.lost_after_s * 2 ** (row["wake_count"] if row else 0)
        guilty_s = sum(_cost_s(job.prompt) for job in self._open.values())
        ahead_s = sum(_run_s(job.prompt) for job in self._open.values() if job.model == model)
        return FIND_S + resent_s + guilty_s + ahead_s / LEAST_ROWS

    def check(self) -> None:
        """Now that all have ended."""
        started = _first(self._store.rows("attempts"), self._since)
        for id in self._waits:
            row = self._store.tables["jobs"].get(id)
            if row is None or not row["model"]:
                continue
            waited = started.get(id, row["finished_at"]) - max(self._since, row["not_before"])
            longest_s = self.longest_s(id)
            expect(
                waited <= timedelta(seconds=longest_s),
                f"I7: {self._open[id].prompt!r} waited {waited}, longer than {longest_s:.0f} s",
            )


def _first(attempts: Iterable[Row], since: datetime) -> dict[UUID, datetime]:
    """When each job was first claimed after a time."""
    first: dict[UUID, datetime] = {}
    for attempt in sorted(attempts, key=lambda each: each["claimed_at"], reverse=True):
        if attempt["claimed_at"] >= since:
            first[attempt["job_id"]] = attempt["claimed_at"]
    return first
