"""Removing what a job says, whichever door it came through."""

from __future__ import annotations

from contextlib import suppress
from uuid import UUID

from app.api.caller import Caller
from app.api.services import Services
from app.errors import Unavailable
from app.jobs import JobState
from app.store import admin_log, purging
from app.store.isolation import Connection


async def purged(here: Services, who: Caller, job_id: UUID, *, is_noted: bool = True) -> JobState:
    """Remove what a caller's job says, wherever it is; its state. It is noted in the log of what
    was done, unless nobody had to ask for it. Raises `JobNotFound`."""
    state = await here.commit(_purge, who, job_id, is_noted)
    with suppress(Unavailable):  # what Redis has of it is gone within minutes
        await here.listeners.forget([job_id])
    if state is JobState.RUNNING:
        await here.tell_workers([job_id])
    return state


def _purge(connection: Connection, who: Caller, job_id: UUID, is_noted: bool) -> JobState:
    state = purging.purge(connection, job_id, tenant=who.tenant)
    if is_noted:
        admin_log.note(connection, who.actor, "job.purged", str(job_id), tenant=who.tenant)
    return state
