"""/v1/messages/batches: thousands of messages as one.

https://docs.claude.com/en/api/creating-message-batches
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Final

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic_core import from_json

from app.api import job_batches
from app.api.anthropic.schemas_batches import (
    DeletedMessageBatch,
    MessageBatch,
    MessageBatchBody,
    MessageBatchCounts,
    MessageBatchList,
)
from app.api.caller import Who
from app.api.envelopes import Door as Protocol
from app.api.idempotency import IdempotencyKey, parse_key
from app.api.inline_file import InlineFile, written
from app.api.problems import documented
from app.api.services import Here, Services
from app.api.wire import raw_bodies
from app.api.wire.pieces import begun
from app.api.wire.raw_bodies import json_body
from app.batches import BatchState, Counts, Door, name_of
from app.errors import BatchNotFound, BatchStateConflict, NoSuchFile, RequestError
from app.files import key_of
from app.jobs import new_id
from app.requests import json_text
from app.requests.bodies import Url
from app.store import files
from app.store.isolation import Connection
from app.store.job_batches import BatchView, NewBatch

router = APIRouter(prefix="/v1/messages/batches", tags=["anthropic"])

_CUSTOM_ID: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")

BatchId = Annotated[str, Path(description="The batch's id.", examples=["msgbatch_0199e0a4f4a9"])]
_ERRORS: Final = documented(
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.SERVICE_UNAVAILABLE,
    door=Protocol.ANTHROPIC,
)
_REFUSED: Final = documented(
    HTTPStatus.CONFLICT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    door=Protocol.ANTHROPIC,
)
_ASKED: Final = {
    "requests": [
        {
            "custom_id": "request-1",
            "params": {
                "model": "smollm2-135m-instruct",
                "max_tokens": 64,
                "messages": [{"role": "user", "content": "What is a grist mill?"}],
            },
        }
    ]
}


@router.post(
    "",
    responses=_ERRORS | _REFUSED,
    openapi_extra=json_body(MessageBatchBody, _ASKED),
    summary="Submit a batch of messages",
    response_description="The batch is accepted.",
)
async def create(
    request: Request, here: Here, who: Who, idempotency_key: IdempotencyKey = None
) -> MessageBatch:
    """Accept a batch. What is wrong with the params of a request is told by its result; a custom_id
    that is wrong or comes twice is refused at once."""
    key = parse_key(idempotency_key) if idempotency_key is not None else None
    async with raw_bodies.body_of(request, here.settings.api.max_bulk_bytes, here.room) as raw:
        items = await here.work.run(len(raw), _items, here, raw)
        async with written(here, who.tenant, raw, items, _Lines().line_of) as file:
            view, file.is_used = await here.commit(_create, here, who.tenant, file, len(items), key)
    return batch_of(view, request, here)


def _items(here: Services, raw: bytearray) -> list[slice]:
    most = here.settings.job_batches.max_requests
    found = json_text.list_among(raw, "requests", most)
    if found is None or not found[0]:
        raw_bodies.parse_json(raw)  # which tells what is wrong if it is no JSON
        raise RequestError(f"requests must be an array of 1 to {most} objects.", param="requests")
    items, place = found
    raw_bodies.parse_json(raw[: place.start] + b"null" + raw[place.stop :])
    return items


class _Lines:
    """The requests of one batch, in their order."""

    def __init__(self) -> None:
        self._custom_ids: set[str] = set()

    def line_of(self, raw: bytes, number: int) -> bytes:
        place = f"requests.{number - 1}"
        try:
            item = from_json(raw)
        except ValueError:
            raise RequestError(f"{place} is no JSON.", param=place) from None
        if not isinstance(item, dict):
            raise RequestError(f"{place} must be an object.", param=place)
        custom_id = item.get("custom_id")
        if not (isinstance(custom_id, str) and _CUSTOM_ID.fullmatch(custom_id)):
            raise RequestError(
                f"{place}.custom_id must have 1 to 64 letters, digits, _ or -.",
                param=f"{place}.custom_id",
            )
        if custom_id in self._custom_ids:
            raise RequestError(
                f"{place}.custom_id: another request has the same.", param=f"{place}.custom_id"
            )
        self._custom_ids.add(custom_id)
        params = item.get("params")
        if not isinstance(params, dict):
            raise RequestError(f"{place}.params must be an object.", param=f"{place}.params")
        return json.dumps({"custom_id": custom_id, "params": params}).encode()


def _create(
    connection: Connection,
    here: Services,
    tenant: str,
    file: InlineFile,
    total: int,
    key: str | None,
) -> tuple[BatchView, bool]:
    """The batch, and whether it is new."""
    keep_s = here.settings.files.keep_s
    batch = NewBatch(
        id=new_id(),
        tenant=tenant,
        door=Door.ANTHROPIC,
        url=Url.MESSAGES,
        input_name="",
        input_file_id=file.id,
        input_bytes=file.bytes,
        window_s=here.settings.job_batches.window_s,
        output_expires_s=keep_s,
        fingerprint=file.sha256,
        metadata={},
        idempotency_key=key,
        total=total,
    )
    file.ready(connection, keep_s)
    return job_batches.keep(connection, batch)


@router.get(
    "", responses=_ERRORS, summary="List batches of messages", response_description="One page."
)
async def list_batches(
    request: Request,
    here: Here,
    who: Who,
    after_id: Annotated[
        str | None, Query(max_length=255, description="Begin after this batch: older ones.")
    ] = None,
    before_id: Annotated[
        str | None, Query(max_length=255, description="End before this batch: newer ones.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1_000, description="Most batches of a page.")] = 20,
) -> MessageBatchList:
    """Batches, newest first."""
    after = job_batches.cursor(Door.ANTHROPIC, after_id, "after_id")
    before = job_batches.cursor(Door.ANTHROPIC, before_id, "before_id")
    if after and before:
        raise RequestError("Give after_id or before_id, not both.", param="before_id")
    page = await job_batches.listed(here, Door.ANTHROPIC, who.tenant, limit + 1, after, before)
    shown = page[1:] if before and len(page) > limit else page[:limit]
    batches = [batch_of(each, request, here) for each in shown]
    return MessageBatchList(
        data=batches,
        has_more=len(page) > limit,
        first_id=batches[0].id if batches else None,
        last_id=batches[-1].id if batches else None,
    )


@router.get(
    "/{batch_id}",
    responses=_ERRORS,
    summary="Follow a batch of messages",
    response_description="The batch.",
)
async def retrieve(request: Request, here: Here, who: Who, batch_id: BatchId) -> MessageBatch:
    """The batch as it is."""
    view = await job_batches.find(here, Door.ANTHROPIC, who.tenant, batch_id)
    return batch_of(view, request, here)


@router.post(
    "/{batch_id}/cancel",
    responses=_ERRORS | documented(HTTPStatus.CONFLICT, door=Protocol.ANTHROPIC),
    summary="Cancel a batch of messages",
    response_description="The batch is being cancelled.",
)
async def cancel(request: Request, here: Here, who: Who, batch_id: BatchId) -> MessageBatch:
    """Requests that run are stopped, those that wait are cancelled; what was finished is kept. May
    be repeated."""
    view = await job_batches.cancel(here, Door.ANTHROPIC, who.tenant, batch_id)
    return batch_of(view, request, here)


@router.delete(
    "/{batch_id}",
    responses=_ERRORS | documented(HTTPStatus.CONFLICT, door=Protocol.ANTHROPIC),
    summary="Delete a batch of messages",
    response_description="It is gone.",
)
async def delete(here: Here, who: Who, batch_id: BatchId) -> DeletedMessageBatch:
    """Remove a batch that is over, and its results; its jobs stay."""
    await job_batches.delete(here, Door.ANTHROPIC, who.tenant, batch_id)
    return DeletedMessageBatch(id=batch_id)


@router.get(
    "/{batch_id}/results",
    response_model=None,
    responses=_ERRORS
    | documented(HTTPStatus.CONFLICT, door=Protocol.ANTHROPIC)
    | {200: {"content": {"application/x-jsonl": {}}, "description": "A line for each request."}},
    summary="Read the results of a batch of messages",
)
async def results(here: Here, who: Who, batch_id: BatchId) -> Response:
    """What became of each request, a line of JSON each, in the order in which they ended."""
    view = await job_batches.find(here, Door.ANTHROPIC, who.tenant, batch_id)
    if not view.state.is_final:
        raise BatchStateConflict("The batch has not ended: its results are not there yet.")
    try:  # it stays when the rows of its lines have gone
        file = await here.query(files.find, view.output_file_id, tenant=who.tenant, name="")
    except NoSuchFile:
        raise BatchNotFound("The results of this batch are not kept any more.") from None
    pieces = await begun(here.objects.read_async(key_of(file.id)))
    return StreamingResponse(
        pieces,
        media_type="application/x-jsonl",
        headers={"Content-Length": str(file.bytes)},
    )


def batch_of(view: BatchView, request: Request, here: Services) -> MessageBatch:
    is_over = view.state.is_final
    is_cancelling = view.state is BatchState.CANCELLING
    counts = view.counts if is_over else Counts(view.counts.total)
    name = name_of(Door.ANTHROPIC, view.id)
    base = here.settings.api.public_url or str(request.base_url)
    return MessageBatch(
        id=name,
        processing_status="ended" if is_over else "canceling" if is_cancelling else "in_progress",
        request_counts=MessageBatchCounts(
            processing=counts.open,
            succeeded=counts.succeeded,
            errored=counts.errored,
            canceled=counts.cancelled,
            expired=counts.expired,
        ),
        created_at=view.created_at,
        expires_at=view.expires_at,
        ended_at=_second(view.ended_at) if is_over else None,
        cancel_initiated_at=_second(view.cancelling_at),
        results_url=f"{base.rstrip('/')}{router.prefix}/{name}/results" if is_over else None,
    )


def _second(stamp: datetime | None) -> datetime | None:
    return stamp and stamp.replace(microsecond=0)
