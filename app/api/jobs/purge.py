"""DELETE /v1/jobs/ID: what a job says is removed, what it took stays."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

from fastapi import APIRouter, Response

from app.api.answers import answer
from app.api.caller import Who
from app.api.jobs.calls import JobId
from app.api.problems import documented
from app.api.purging import purged
from app.api.schemas import Job
from app.api.services import Here
from app.jobs import JobState, job_id_of

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
