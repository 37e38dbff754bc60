"""DELETE /v1/jobs/ID: what a job says is removed, what it took stays."""

from __future__ import annotations

from contextlib import suppress
from http import HTTPStatus
from typing import Any, Final
from uuid import UUID

from fastapi import APIRouter, Response

from app.api.answers import answer
from app.api.caller import Caller, Who
from app.api.jobs import JobId
from app.api.problems import documented
from app.api.schemas import Job
from app.api.services import Here, Services
from app.errors import Unavailable
from app.intake.decision import Decision
from app.jobs import JobState, job_id_of
from app.store import admin_log, purging

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


_STOPPING: Final[dict[int | str, dict[str, Any]]] = {
    202: {
        "model": Job,
        "description": "It was running: its content is removed, and its worker is asked to stop. "
        "Follow it until it is final.",
    }
}


@router.delete(
    "/{job_id}",
    status_code=204,
    response_model=None,
    responses=_STOPPING | documented(HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE),
    summary="Purge a job",
    response_description="What the job says is removed.",
)
async def purge(here: Here, who: Who, job_id: JobId) -> Response:
    """Remove the job's request, response, metadata, idempotency key and error text, at once and for
    good. Its state, timing, tokens and cost stay, and say so in `purged_at`. A queued job is
    cancelled with it, a running one is stopped and gets no response. May be repeated.

    The same idempotency key makes a new job afterwards.
    """
    id = job_id_of(job_id)
    if await purged(here, who, id) is JobState.RUNNING:
        return answer(await here.job(who.tenant, id), status=202)
    return Response(status_code=204)


async def purged(here: Services, who: Caller, job_id: UUID, *, is_noted: bool = True) -> JobState:
    """Remove what a caller's job says, wherever it is; its state. It is noted in the log of what
    was done, unless nobody had to ask for it. Raises `JobNotFound`."""
    state = await here.write(_purge, here, who, job_id, is_noted)
    with suppress(Unavailable):  # what Redis has of it is gone within minutes
        await here.listeners.forget([job_id])
    if state is JobState.RUNNING:
        await here.tell_workers([job_id])
    return state


def _purge(
    decision: Decision, here: Services, who: Caller, job_id: UUID, is_noted: bool
) -> JobState:
    with here.database.begin() as connection:
        state = purging.purge(connection, job_id, tenant=who.tenant)
        if is_noted:
            admin_log.note(connection, who.actor, "job.purged", str(job_id), tenant=who.tenant)
        decision.commit()
    return state
