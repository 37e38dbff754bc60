"""GET /v1/jobs: which jobs there are, page by page."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Final
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request

from app.api.caller import Who
from app.api.problems import documented
from app.api.schemas import MAX_PAGE, JobList, JobSummary, ModelName
from app.api.services import Here, Services
from app.api.views import summary_of, told
from app.api.wire import query
from app.errors import JobUnreadable, RequestError
from app.jobs import JobState, job_id_of
from app.requests.storable import parse_metadata, refuse_unstorable
from app.store import reads
from app.store.lists import Filter
from app.store.reads import JobView, Unreadable

log = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


async def filter_of(
    request: Request,
    state: Annotated[JobState | None, Query(description="Only jobs in this state.")] = None,
    model: Annotated[
        ModelName | None,
        Query(description="Only jobs of this model.", examples=["all-minilm-l6-v2"]),
    ] = None,
    error_code: Annotated[
        str | None,
        Query(
            pattern=r"^[a-z_]{1,100}$",
            description="Only jobs that ended with this error.",
            examples=["engine_crash"],
        ),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        Query(
            min_length=1,
            max_length=255,
            description="Only the job that was submitted with this key.",
            examples=["order-42-summary"],
        ),
    ] = None,
    since: Annotated[
        datetime | None,
        Query(
            description="Only jobs accepted at or after this time (RFC 3339, with its zone).",
            examples=["2027-01-31T12:00:00Z"],
        ),
    ] = None,
    until: Annotated[
        datetime | None,
        Query(
            description="Only jobs accepted before this time (RFC 3339, with its zone).",
            examples=["2027-01-31T18:00:00Z"],
        ),
    ] = None,
) -> Filter:
    """Which jobs a list is of."""
    for name, time in (("since", since), ("until", until)):
        if time is not None and time.tzinfo is None:
            example = f"{name} must name its zone, as in 2027-01-31T12:00:00Z."
            raise RequestError(example, param=name)
    refuse_unstorable(idempotency_key, "idempotency_key")
    return Filter(
        states=[state] if state else tuple(JobState),
        model=model,
        error_code=error_code,
        metadata=parse_metadata(query.members_of("metadata", request)),
        idempotency_key=idempotency_key,
        since=since,
        until=until,
    )


_METADATA: Final = query.family(
    "metadata",
    "Only jobs with these pairs among their metadata: `metadata[KEY]=VALUE`.",
    {"customer": "42"},
)


@router.get(
    "",
    responses=documented(
        HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE
    ),
    openapi_extra={"parameters": [_METADATA]},
    summary="List jobs",
    response_description="One page of jobs.",
)
async def list_jobs(
    here: Here,
    who: Who,
    wanted: Annotated[Filter, Depends(filter_of)],
    after: Annotated[
        str | None,
        Query(max_length=255, description="Begin after this job: `last_id` of the page before."),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Most jobs of a page.")] = 20,
) -> JobList:
    """Jobs without their answers, newest first. One whose row cannot be read is left out."""
    page = await here.read(
        _list_jobs,
        here,
        who.tenant,
        wanted,
        after=job_id_of(after) if after else None,
        limit=limit + 1,
    )
    shown = page[:limit]
    return JobList(
        data=list(_summaries(here, shown)),
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
        has_more=len(page) > limit,
    )


def _summaries(here: Services, views: Iterable[JobView | Unreadable]) -> Iterator[JobSummary]:
    outlook = here.submitter.outlook
    for view in views:
        try:
            yield told(lambda view: summary_of(view, outlook.of(view)), view)
        except JobUnreadable as error:
            log.warning("%s", error, extra={"job_id": view.id, "action": "job_unreadable"})


def _list_jobs(
    here: Services, tenant: str, wanted: Filter, *, after: UUID | None, limit: int
) -> list[JobView | Unreadable]:
    with here.database.begin() as connection:
        return reads.list_jobs(connection, wanted, after=after, limit=limit, tenant=tenant)
