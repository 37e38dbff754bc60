"""/v1/jobs/status and /v1/jobs/cancel: many jobs with one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Final
from uuid import UUID

from fastapi import APIRouter, Request, Response

from app.api import problems, reader
from app.api.answers import JSON, LOOK_AGAIN, Held, Hold
from app.api.caller import Who, WhoReads
from app.api.jobs.schemas_many import (
    MAX_IDS_FULL,
    BulkCancel,
    BulkStatus,
    CancelFilter,
    CancelItem,
    CancelRequest,
    StatusItem,
    StatusRequest,
    View,
)
from app.api.problems import documented
from app.api.reader import Outcome, Snapshot
from app.api.services import Here, Services
from app.api.wire import checked
from app.api.wire.raw_bodies import json_body
from app.errors import GristmillError, JobNotFound, JobStateConflict, Unavailable
from app.intake.decision import Decision
from app.jobs import JobState, job_id_of
from app.store import cancellation, lists, reads
from app.store.lists import Filter

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

PAGE: Final = 100
"""Jobs that are read at once."""
WHOLE_PAGE: Final = 25
"""The same with their answers, which may be long."""
MAX_ANSWERS_BYTES: Final = 16_000_000
"""Once an answer is as long as this, further jobs come with their states alone."""

HELD_S: Final = 5.0
"""How long a bulk cancel waits for rows that others hold, one by one; the rest is refused."""

Told = JobState | Snapshot | Exception
"""What an item tells of a job."""

_ERRORS: Final = documented(
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    HTTPStatus.SERVICE_UNAVAILABLE,
)
_IDS: Final = ["0b9f1c5e-6c8f-4d3a-9a3f-0d9b7f2f6a11", "5b1d3a52-3a3c-4c0f-8c9a-6c1f0c6e1c55"]


@router.post(
    "/status",
    response_model=BulkStatus,
    responses=_ERRORS,
    openapi_extra=json_body(StatusRequest, {"ids": _IDS, "wait_for": "any"}),
    summary="Follow many jobs",
    response_description="One item for each id, in order.",
)
async def status(request: Request, here: Here, who: WhoReads, hold: Held) -> Response:
    """The jobs as they are, or, with `wait`, as soon as all of them (or any) are final.

    An id that is no job's is answered in its place, and is not waited for. With `wait_for` any,
    leave out of the next call what is final. While not all are, `Retry-After` says when to look
    again.
    """
    asked = await checked.read(request, here, StatusRequest)
    ids = [job_id_of(text) for text in asked.ids]
    is_one_look = asked.view == "ended" and asked.wait_for == "any"
    look = _ended if is_one_look else _states
    told = await _in_time(here, look, who.tenant, dict.fromkeys(ids), asked, hold)
    if asked.view == "ended" and not is_one_look:  # who waits for all has answers read but once
        told = await here.read(_ended, here, who.tenant, list(told))
    elif asked.view in ("summary", "full"):
        told |= await _jobs(here, who.tenant, list(told), asked.view)
    items = [_status_item(index, id, told.get(id)) for index, id in enumerate(ids)]
    is_final = all(_is_final(each) for each in told.values())
    body = b'{"object":"bulk_status","is_final":%b,"items":[%b]}' % (
        b"true" if is_final else b"false",
        b",".join(items),
    )
    headers = {"Cache-Control": "private, no-cache"} | hold.headers
    return Response(body, 200, headers if is_final else headers | LOOK_AGAIN, media_type=JSON)


async def _in_time(
    here: Services,
    look: Callable[[Services, str, Collection[UUID]], dict[UUID, Told]],
    tenant: str,
    ids: Collection[UUID],
    asked: StatusRequest,
    hold: Hold,
) -> dict[UUID, Told]:
    """Those that exist as a look finds them, once all or any are final, or at the end of the
    hold."""

    def still_open(seen: Mapping[UUID, Told]) -> list[UUID]:
        are_open = [id for id, state in seen.items() if not _is_final(state)]
        is_enough = asked.wait_for == "any" and len(are_open) < len(seen)
        return [] if is_enough else are_open

    read = partial(here.read, look, here, tenant, ids)
    return await here.waiters.until(
        *(read, still_open, ids, hold.seconds_at(here)),
        for_all=asked.wait_for == "all",
        gather_s=asked.gather_s,
    )


def _states(here: Services, tenant: str, ids: Collection[UUID]) -> dict[UUID, Told]:
    with here.database.autocommit(looks_up=True) as connection:
        found = reads.states(connection, ids, tenant=tenant)
    return {id: found[id] for id in ids if id in found}


def _ended(here: Services, tenant: str, ids: Collection[UUID]) -> dict[UUID, Told]:
    """The states of open jobs, and the others, as far as one answer takes them; then their
    states."""
    with here.database.autocommit(looks_up=True) as connection:
        told: dict[UUID, Told] = dict(reads.open_states(connection, ids, tenant=tenant))
    rest = [id for id in ids if id not in told]
    num_shown = num_bytes = 0
    while rest and num_shown < MAX_IDS_FULL and num_bytes < MAX_ANSWERS_BYTES:
        size = min(WHOLE_PAGE, MAX_IDS_FULL - num_shown)
        page = reader.snapshots(here.database, here.submitter.outlook, tenant, rest[:size])
        told |= {id: _unless_open(each) for id, each in page.items()}
        rest = rest[size:]
        num_shown += size
        num_bytes += _num_bytes(page)
    return told | _states(here, tenant, rest) if rest else told


def _unless_open(found: Outcome) -> Told:
    """One that was accepted since it was looked for among the open ones has its state alone."""
    return found.state if isinstance(found, Snapshot) and not found.is_final else found


def _num_bytes(page: Mapping[UUID, Outcome]) -> int:
    return sum(len(each.body) for each in page.values() if isinstance(each, Snapshot))


async def _jobs(
    here: Services, tenant: str, ids: Sequence[UUID], view: View
) -> Mapping[UUID, Told]:
    """The jobs, page by page; without those beyond `MAX_ANSWERS_BYTES`."""
    summary = reader.summaries, PAGE
    read, size = summary if view == "summary" else (reader.snapshots, WHOLE_PAGE)
    told: dict[UUID, Told] = {}
    num_bytes = 0
    for start in range(0, len(ids), size):
        if num_bytes >= MAX_ANSWERS_BYTES:
            break
        page = await here.read(
            read, here.database, here.submitter.outlook, tenant, ids[start : start + size]
        )
        told.update(page)
        num_bytes += _num_bytes(page)
    return told


def _is_final(told: Told) -> bool:
    """Whether it is of no use to wait for it."""
    match told:
        case JobState() as state:
            return state.is_final
        case Snapshot() as job:
            return job.is_final
        case _:
            return True


def _status_item(index: int, id: UUID, told: Told | None) -> bytes:
    match told:
        case Snapshot(state=state, body=body):
            return b'{"status":200,"id":"%b","state":"%b","job":%b}' % (
                str(id).encode(),
                state.encode(),
                body,
            )
        case JobState() as state:
            return b'{"status":200,"id":"%b","state":"%b"}' % (str(id).encode(), state.encode())
        case other:
            error = other if isinstance(other, GristmillError) else JobNotFound()
            problem = problems.describe(error, instance=f"/v1/jobs/status#/ids/{index}")
            item = StatusItem(status=problem.status, id=id, error=problem)
            return item.model_dump_json(exclude_none=True).encode()


@router.post(
    "/cancel",
    response_model=BulkCancel,
    responses=_ERRORS,
    openapi_extra=json_body(CancelRequest, {"filter": {"metadata": {"customer": "42"}}}),
    summary="Cancel many jobs",
    response_description="One item for each job, in the order of the ids.",
)
async def cancel(request: Request, here: Here, who: Who) -> Response:
    """Cancel jobs by their ids, or up to `limit` of those that pass a filter, newest first.

    Queued ones are cancelled at once; running ones are stopped by their workers, and do not pass
    the filter again. Send the same filter until `has_more` is false. May be repeated.
    """
    asked = await checked.read(request, here, CancelRequest)
    has_more = False
    if asked.filter is None:
        ids = [job_id_of(text) for text in asked.ids or ()]
    else:
        page = await here.read(_open_jobs, here, who.tenant, asked.filter, asked.limit + 1)
        ids, has_more = page[: asked.limit], len(page) > asked.limit
    told = await here.write(_cancel, here, who.tenant, set(ids))
    await here.tell_workers([id for id, state in told.items() if state is JobState.RUNNING])
    items = [_cancel_item(index, id, told.get(id)) for index, id in enumerate(ids)]
    counted = [item.status for item in items]
    body = BulkCancel(
        cancelled=counted.count(HTTPStatus.OK),
        stopping=counted.count(HTTPStatus.ACCEPTED),
        refused=sum(status >= HTTPStatus.BAD_REQUEST for status in counted),
        has_more=has_more,
        items=items,
    )
    return Response(body.model_dump_json(exclude_none=True), media_type=JSON)


def _open_jobs(here: Services, tenant: str, given: CancelFilter, limit: int) -> list[UUID]:
    states = [JobState(given.state)] if given.state else [JobState.QUEUED, JobState.RUNNING]
    wanted = Filter(
        states=states,
        model=given.model,
        metadata=given.metadata,
        since=given.since,
        until=given.until,
        is_asked=False,
    )
    with here.database.begin() as connection:
        return lists.newest(connection, wanted, limit=limit, tenant=tenant)


def _cancel(
    decision: Decision, here: Services, tenant: str, ids: Collection[UUID]
) -> dict[UUID, JobState | GristmillError]:
    """The states of those that exist. First those that nobody holds, in one transaction; then one
    by one what somebody held: nobody waits for a row while he holds others."""
    told: dict[UUID, JobState | GristmillError] = {}
    with here.database.begin() as connection:
        told |= cancellation.cancel_free(connection, ids, tenant=tenant)
        held = reads.states(connection, [id for id in ids if id not in told], tenant=tenant)
        decision.commit()
    give_up_at = time.monotonic() + HELD_S
    for id in sorted(held):
        is_late = time.monotonic() > give_up_at
        told[id] = Unavailable() if is_late else _cancel_held(decision, here, tenant, id)
    return told


def _cancel_held(
    decision: Decision, here: Services, tenant: str, id: UUID
) -> JobState | GristmillError:
    try:
        with here.database.begin() as connection:
            state = cancellation.end(connection, id, tenant=tenant)
            decision.commit()
    except GristmillError as error:
        return error
    return state


def _cancel_item(index: int, id: UUID, told: JobState | GristmillError | None) -> CancelItem:
    state = told if isinstance(told, JobState) else None
    match told:
        case JobState.CANCELLED:
            return CancelItem(status=HTTPStatus.OK, id=id, state=state)
        case JobState.RUNNING:
            return CancelItem(status=HTTPStatus.ACCEPTED, id=id, state=state)
        case None:
            error: GristmillError = JobNotFound()
        case JobState():
            error = JobStateConflict(f"The job is {told} already.")
        case _:
            error = told
    problem = problems.describe(error, instance=f"/v1/jobs/cancel#/ids/{index}")
    return CancelItem(status=problem.status, id=id, state=state, error=problem)
