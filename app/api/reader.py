"""Reads jobs for all of a tenant who ask at about the same time, with one look at Postgres.

While a look is on its way, whoever asks waits for the next one, together with all others. So one
caller is answered at once, and a thousand take a few looks and not a thousand: however many poll,
Postgres and this process's threads see no more than `AT_ONCE` of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Final
from uuid import UUID

from app.api.schemas import JobSummary
from app.api.views import job_of, summary_of, told
from app.errors import GristmillError, JobNotFound, JobUnreadable
from app.intake.outlook import Outlook
from app.jobs import JobState
from app.store import reads
from app.store.database import Database
from app.store.reads import JobView, Unreadable

AT_ONCE: Final = 2
"""Looks that may be on their way: one that takes long does not hold up the others."""
MOST_JOBS: Final = 100
"""Of one look; their answers may be long."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A job as it was read: the JSON that tells of it."""

    state: JobState
    body: bytes
    lasting: bytes | None = None  #: the same without what changes by itself; None if nothing does
    job: JobSummary | None = None  #: what it was made of

    @classmethod
    def of(cls, job: JobSummary) -> Snapshot:
        """Raises `ValueError` if it is nested too deep for JSON."""
        lasting = job.model_dump_json(exclude={"position", "eta"}).encode() if job.eta else None
        return cls(job.state, job.model_dump_json().encode(), lasting, job)

    @property
    def is_final(self) -> bool:
        return self.state.is_final

    @property
    def etag(self) -> str:
        """Weak while place and time of a job that waits are left out of it: those change at every
        look, and whoever asks whether anything has happened is not told of them."""
        digest = sha256(self.lasting or self.body).hexdigest()[:32]
        return f'W/"{digest}"' if self.lasting else f'"{digest}"'


Outcome = Snapshot | Exception


def snapshots(
    database: Database, outlook: Outlook, tenant: str, ids: Sequence[UUID]
) -> dict[UUID, Outcome]:
    """Those of the jobs that a tenant has, or why one cannot be told of. Not for the event loop."""
    with database.autocommit(looks_up=True) as connection:
        views = reads.find(connection, ids, tenant=tenant)
    return {view.id: _snapshot(view, lambda view: job_of(view, outlook.of(view))) for view in views}


def summaries(
    database: Database, outlook: Outlook, tenant: str, ids: Sequence[UUID]
) -> dict[UUID, Outcome]:
    """The same without their answers."""
    with database.autocommit(looks_up=True) as connection:
        views = reads.summaries(connection, ids, tenant=tenant)
    return {
        view.id: _snapshot(view, lambda view: summary_of(view, outlook.of(view))) for view in views
    }


def _snapshot(view: JobView | Unreadable, tell: Callable[[JobView], JobSummary]) -> Outcome:
    try:
        return Snapshot.of(told(tell, view))
    except JobUnreadable as error:
        return error
    except ValueError:  # of the writer of JSON: nested too deep
        return JobUnreadable("The job's response is nested too deep.")


Look = Callable[[str, Sequence[UUID]], Awaitable[Mapping[UUID, Outcome]]]


class Reader:
    """Owner of the reads of single jobs; belongs to the event loop's thread."""

    def __init__(self, look: Look) -> None:
        """`look` finds those of some jobs that a tenant has."""
        self._look = look
        #: For the next look.
        self._asked: dict[tuple[str, UUID], asyncio.Future[Outcome]] = {}
        self._looking: set[asyncio.Task[None]] = set()

    async def read(self, tenant: str, job_id: UUID) -> Snapshot:
        """The tenant's job as it is now. Raises `JobNotFound`, and what kept it from being read."""
        key = tenant, job_id
        if (asked := self._asked.get(key)) is None:
            asked = self._asked[key] = asyncio.get_running_loop().create_future()
            if len(self._looking) < AT_ONCE:
                task = asyncio.create_task(self._work_off())
                self._looking.add(task)
                task.add_done_callback(self._looking.discard)
        outcome = await asyncio.shield(asked)  # others may wait for it, too
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _work_off(self) -> None:
        while self._asked:
            tenant, _ = next(iter(self._asked))  # whoever has waited longest; a look is of one
            ids = list(islice((id for owner, id in self._asked if owner == tenant), MOST_JOBS))
            futures = {id: self._asked.pop((tenant, id)) for id in ids}
            outcomes = await self._outcomes(tenant, ids)
            for id, future in futures.items():
                future.set_result(outcomes[id])

    async def _outcomes(self, tenant: str, ids: Sequence[UUID]) -> Mapping[UUID, Outcome]:
        try:
            found = await self._look(tenant, ids)
        except GristmillError as error:
            return dict.fromkeys(ids, error)
        except Exception as error:  # of one of them: the others do not suffer for it
            if len(ids) == 1:
                return {ids[0]: error}
            return {id: (await self._outcomes(tenant, [id]))[id] for id in ids}
        return {id: found.get(id) or JobNotFound() for id in ids}
