"""GET /v1/jobs/ID/timeline: what a job waited for, and what it took."""

from __future__ import annotations

from http import HTTPStatus
from uuid import UUID

from fastapi import APIRouter

from app.api.caller import Who
from app.api.jobs.calls import JobId
from app.api.jobs.schemas_timeline import Timeline
from app.api.jobs.timeline_views import timeline_of
from app.api.problems import documented
from app.api.services import Here
from app.api.views import told
from app.errors import JobNotFound
from app.jobs import job_id_of
from app.store import reads, surroundings
from app.store.database import Database

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.get(
    "/{job_id}/timeline",
    responses=documented(HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE),
    summary="Explain a job",
    response_description="The job's timeline.",
)
async def timeline(here: Here, who: Who, job_id: JobId) -> Timeline:
    """Where each millisecond and each nanosecond of device time of a job went, from what the tables
    say: of one that waits or runs, until now."""
    return await here.read(_read, here.database, who.tenant, job_id_of(job_id))


def _read(database: Database, tenant: str, job_id: UUID) -> Timeline:
    with database.autocommit() as connection:
        found = reads.summaries(connection, [job_id], tenant=tenant)
        if not found:
            raise JobNotFound()
        return told(
            lambda job: timeline_of(job, surroundings.of_job(connection, job, tenant=tenant)),
            found[0],
        )
