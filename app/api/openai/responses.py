"""/v1/responses: OpenAI's Responses API, in the same call or in the background.

A response is a job like all others, and its id is the job's. What is told of one comes from its
rows, so that it outlives every process: https://platform.openai.com/docs/guides/background.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Path, Query, Request, Response

from app.api.answers import Hold, described, json_of, look, look_at_new
from app.api.caller import Caller, Who, WhoReads
from app.api.envelopes import Door
from app.api.live import calls
from app.api.live.calls import Placed, Understood
from app.api.openai.response_rows import (
    Row,
    answered,
    body_of,
    history_of,
    response_at,
    response_of,
    row_of,
    whole,
)
from app.api.openai.response_stream import stream
from app.api.problems import documented
from app.api.purging import purged
from app.api.schemas import Job
from app.api.services import Here, Services
from app.api.wire.raw_bodies import json_body
from app.errors import GristmillError, RequestError
from app.jobs import MAX_PRIORITY, JobState
from app.requests.bodies import FORMAT, Url
from app.requests.response import ResponsesBody
from app.requests.response_answer import hex_of
from app.requests.response_input import input_items, page_of
from app.store import cancellation
from app.store.asked import Asked
from app.store.submissions import NewJob

router = APIRouter(prefix="/v1/responses", tags=["openai"])

WINDOWS: Final = {"2h": timedelta(hours=2), "8h": timedelta(hours=8)}
"""When a response in the background expires that has one of these as its `completion_window`."""
PRIORITIES: Final = {"flex": 5, "2h": 7, "8h": MAX_PRIORITY}
"""Of jobs that may wait, by their service tier or completion window; others have 0."""
STOP_S: Final = 5.0
"""How long the answer to a cancel waits for the worker to stop."""

_EXAMPLE: Final = {"input": "What is a grist mill?", "max_output_tokens": 64, "background": True}
_READ_ERRORS: Final = documented(
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.SERVICE_UNAVAILABLE,
    door=Door.OPENAI,
)
_CONFLICT: Final = documented(HTTPStatus.CONFLICT, door=Door.OPENAI)
_BODY_ERRORS: Final = _READ_ERRORS | documented(
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    HTTPStatus.TOO_MANY_REQUESTS,
    door=Door.OPENAI,
)
_ERRORS: Final = (
    _BODY_ERRORS
    | _CONFLICT
    | documented(HTTPStatus.UNPROCESSABLE_ENTITY, HTTPStatus.GATEWAY_TIMEOUT, door=Door.OPENAI)
)

ResponseId = Annotated[
    str, Path(description="The response's id.", examples=["resp_0b9f1c5e6c8f4d3a9a3f0d9b7f2f6a11"])
]


@dataclass(frozen=True, slots=True)
class Told:
    """What of a body is the door's own affair."""

    is_background: bool
    is_stored: bool
    is_streamed: bool


def understood(body: dict[str, Any]) -> Understood[Told]:
    told = Told(
        is_background=body.get("background") is True,
        is_stored=body.get("store") is not False,
        is_streamed=body.get("stream") is True,
    )
    submission = {"url": Url.RESPONSES, "body": body, "stream_events": told.is_streamed}
    return Understood(submission, told)


async def _read(
    request: Request, here: Services, who: Caller, ignored: frozenset[str] = frozenset()
) -> tuple[NewJob, Told]:
    """The job that is asked for, with the conversation before it."""

    async def complete(body: dict[str, Any]) -> dict[str, Any]:
        body = {name: it for name, it in body.items() if name not in ignored}
        if isinstance(previous := body.get("previous_response_id"), str):
            return body | {"history": await history_of(here, who.tenant, previous)}
        return body

    return await calls.read(request, here, who, understood, complete)


@router.post(
    "",
    **described("The response; one in the background is queued.", _ERRORS, is_streamable=True),
    openapi_extra=json_body(ResponsesBody, _EXAMPLE),
    summary="Create a response",
)
async def create(request: Request, here: Here, who: Who) -> Response:
    """Answer a text or a conversation, as OpenAI's call of the same path does. With `background` it
    is answered at once, stored, and to be retrieved when it is done."""
    job, told = await _read(request, here, who)
    asked = Asked(job.url, job.request, FORMAT)
    if told.is_background:
        body = await here.work.run(0, body_of, asked)
        row = Row(await _queued(here, job, body), asked, body)
        if told.is_streamed:
            return await stream(here, who.tenant, row, None)
        return json_of(row.response)
    placed = await calls.place(request, here, job)
    close = partial(_close, here, who, placed, is_stored=told.is_stored)
    if told.is_streamed:
        try:
            body = await here.work.run(0, body_of, asked)
            row = Row(whole((await here.job(who.tenant, placed.id)).job), asked, body)
            return await stream(here, who.tenant, row, None, close)
        except BaseException:
            await close(has_ended=False)
            raise
    try:
        ended = await calls.ended(request, here, placed)
    finally:
        await close(has_ended=True)  # or cancelled there
    return json_of(answered(ended))


async def _close(
    here: Services, who: Caller, placed: Placed, has_ended: bool, *, is_stored: bool
) -> None:
    """Nobody listens any more, or there is no more to hear."""
    if not has_ended:
        await calls.cancel(here, placed)
    if not is_stored:
        await purged(here, who, placed.id, is_noted=False)


async def _queued(here: Services, job: NewJob, body: ResponsesBody) -> Job:
    """Store a job that is followed or retrieved later."""
    window = body.background_options and body.background_options.completion_window
    later = WINDOWS.get(window or "")
    try:
        stored = await here.writer.store(
            replace(
                job,
                priority=PRIORITIES.get(window or body.service_tier or "", 0),
                deadline=None if later is None else here.submitter.outlook.now() + later,
            )
        )
        submitted = stored.only
    except GristmillError:
        here.metrics.count_submissions("refused")
        raise
    here.metrics.count_submissions("accepted" if submitted.created else "replayed")
    seen = await look_at_new(here, job.tenant, stored, Hold(0.0, False))
    return whole(seen.job)


@router.get(
    "/{response_id}",
    **described("The response as it is, or its events.", _READ_ERRORS, is_streamable=True),
    summary="Retrieve a response",
)
async def retrieve(
    here: Here,
    who: Who,
    response_id: ResponseId,
    streams: Annotated[
        bool, Query(alias="stream", description="Its events, till it has ended.")
    ] = False,
    starting_after: Annotated[
        int | None,
        Query(
            ge=0,
            lt=2**63,
            description="With `stream`: those after the event with this number. Without it, all.",
            examples=[7],
        ),
    ] = None,
) -> Response:
    """A response as it is now: follow one in the background until its `status` is neither `queued`
    nor `in_progress`. Or its events, from the first one or from any other one on; text comes piece
    by piece while it runs if it was created with `stream`."""
    if streams:
        row = await row_of(here, who.tenant, response_id)
        return await stream(here, who.tenant, row, starting_after)
    return json_of(await response_at(here, who.tenant, response_id))


@router.post(
    "/{response_id}/cancel",
    **described("The response, cancelled.", _READ_ERRORS | _CONFLICT),
    summary="Cancel a response",
)
async def cancel(here: Here, who: Who, response_id: ResponseId) -> Response:
    """Cancel a response that runs in the background. May be repeated."""
    row = await row_of(here, who.tenant, response_id)
    if not row.body.background:
        raise RequestError("Only a response in the background can be cancelled.")
    state = await here.commit(cancellation.cancel, row.job.id, tenant=who.tenant)
    if state is JobState.RUNNING:
        await here.tell_workers([row.job.id])
    hold = Hold(STOP_S, False)
    seen = await look(here, who.tenant, row.job.id, hold)
    return json_of(response_of(whole(seen.job), row.body))


@router.delete(
    "/{response_id}",
    **described("It is deleted.", _READ_ERRORS),
    summary="Delete a response",
)
async def delete(here: Here, who: Who, response_id: ResponseId) -> Response:
    """Remove what was asked and answered, at once and for good. One that has not ended is
    cancelled. What it took stays in the books."""
    row = await row_of(here, who.tenant, response_id)
    await purged(here, who, row.job.id)
    return json_of({"id": response_id, "object": "response", "deleted": True})


@router.get(
    "/{response_id}/input_items",
    **described("A page of items.", _READ_ERRORS),
    summary="List what a response was asked",
)
async def list_input_items(
    here: Here,
    who: Who,
    response_id: ResponseId,
    limit: Annotated[
        int, Query(ge=1, le=100, description="Most items of a page.", examples=[20])
    ] = 20,
    order: Annotated[
        Literal["asc", "desc"], Query(description="Oldest first, or newest first.")
    ] = "desc",
    after: Annotated[
        str | None, Query(description="The id of the last item of the page before.")
    ] = None,
) -> Response:
    """The items of a response's input, the conversation before it included, page by page."""
    row = await row_of(here, who.tenant, response_id)
    items = input_items(row.body, hex_of(row.response))
    try:
        return json_of(page_of(items, order, after, limit))
    except ValueError:
        raise RequestError("There is no such item.", param="after") from None


@router.post(
    "/input_tokens",
    **described("How many tokens it has.", _BODY_ERRORS),
    openapi_extra=json_body(ResponsesBody, {"input": "What is a grist mill?"}),
    summary="Count the tokens of an input",
)
async def count_input_tokens(request: Request, here: Here, who: WhoReads) -> Response:
    """How many tokens the prompt of such a call has, as its model counts them. Nothing is
    stored."""
    job, _ = await _read(request, here, who, _NOT_COUNTED)
    return json_of({"object": "response.input_tokens", "input_tokens": job.input_tokens or 0})


_NOT_COUNTED: Final = frozenset({"background", "background_options", "store", "stream"})
"""Fields that have nothing to do with the prompt, and might not go together."""
