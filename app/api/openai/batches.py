"""/v1/batches: thousands of requests as one.

https://platform.openai.com/docs/api-reference/batch
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import partial
from http import HTTPStatus
from typing import Annotated, Final

from fastapi import APIRouter, Path, Query, Request
from pydantic_core import from_json, to_json

from app.api import job_batches
from app.api.caller import Who
from app.api.envelopes import Door as Protocol
from app.api.idempotency import IdempotencyKey, parse_key
from app.api.inline_file import InlineFile, written
from app.api.openai import batch_request
from app.api.openai.batch_request import WINDOW, BatchRequest
from app.api.openai.schemas_batches import (
    Batch,
    BatchBody,
    BatchError,
    BatchErrors,
    BatchList,
    BatchUsage,
    InputDetails,
    OutputDetails,
    RequestCounts,
)
from app.api.pages import page_of
from app.api.problems import documented
from app.api.services import Here, Services
from app.api.wire import raw_bodies
from app.api.wire.raw_bodies import json_body
from app.batches import BatchState, Door, name_of
from app.errors import NoSuchFile, RequestError
from app.files import id_in as file_in
from app.files import name_of as file_name
from app.jobs import new_id
from app.requests import json_text
from app.store import files
from app.store.isolation import Connection
from app.store.job_batches import BatchView, NewBatch
from app.webhooks.addresses import Reach

router = APIRouter(prefix="/v1/batches", tags=["batches"])

BatchId = Annotated[str, Path(description="The batch's id.", examples=["batch_0199e0a4f4a97c53"])]

_ERRORS: Final = documented(
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.SERVICE_UNAVAILABLE,
    door=Protocol.OPENAI,
)
_REFUSED: Final = documented(
    HTTPStatus.CONFLICT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    door=Protocol.OPENAI,
)
_EXAMPLE: Final = {
    "input_file_id": "file-0199e0a4f4a97c53a7b3a9f5d8f6d2ce",
    "endpoint": "/v1/chat/completions",
    "completion_window": "24h",
}


@router.post(
    "",
    responses=_ERRORS | _REFUSED,
    openapi_extra=json_body(BatchBody, _EXAMPLE),
    summary="Submit a batch",
    response_description="The batch is accepted.",
)
async def create(
    request: Request, here: Here, who: Who, idempotency_key: IdempotencyKey = None
) -> Batch:
    """Accept a batch of requests, in a file or in `requests`. What is wrong with one of them is
    told by the batch, which then has failed; other errors are told at once."""
    header = parse_key(idempotency_key) if idempotency_key is not None else None
    most = here.settings.api.max_bulk_bytes
    async with raw_bodies.body_of(request, most, here.room) as raw:
        asked = await here.work.run(len(raw), _read, here, raw, header)
        if asked.items is None:
            view, _ = await here.commit(_create, here, who.tenant, asked.request)
        else:
            view = await _create_inline(here, who.tenant, asked.request, raw, asked.items)
    return batch_of(view)


@dataclass(frozen=True, slots=True)
class _Asked:
    request: BatchRequest
    items: list[slice] | None  #: where its requests are in the body, if they are


def _read(here: Services, raw: bytearray, header: str | None) -> _Asked:
    most = here.settings.job_batches.max_requests
    inline = json_text.list_among(raw, "requests", most)
    if inline is None:
        value = raw_bodies.parse_json(raw)
        if isinstance(value, dict) and value.get("requests") is not None:
            sentence = f"'requests' must be an array of 1 to {most} objects."
            raise RequestError(sentence, param="requests")
        return _Asked(_parsed(here, value, header, is_inline=False), None)
    items, place = inline
    if not items:
        raise RequestError(f"'requests' must be an array of 1 to {most} objects.", param="requests")
    rest = bytes(raw[: place.start]) + b"null" + bytes(raw[place.stop :])
    value = raw_bodies.parse_json(rest)
    return _Asked(_parsed(here, value, header, is_inline=True), items)


def _parsed(here: Services, value: object, header: str | None, *, is_inline: bool) -> BatchRequest:
    asked = batch_request.parse(value, is_inline=is_inline, header=header)
    if asked.webhook_url is not None:
        Reach.of(here.settings.webhooks).check_url(asked.webhook_url)
    return asked


async def _create_inline(
    here: Services, tenant: str, asked: BatchRequest, raw: bytearray, items: list[slice]
) -> BatchView:
    """The requests become a file as any other, which is then the batch's."""
    async with written(here, tenant, raw, items, partial(_line, asked)) as file:
        view, file.is_used = await here.commit(_create, here, tenant, asked, file)
    return view


def _line(asked: BatchRequest, raw: bytes, number: int) -> bytes:
    """As one row. What cannot be read stays as it is, for the batch to tell."""
    try:
        item = from_json(raw)
    except ValueError:
        item = None
    if not isinstance(item, dict):
        return b" ".join(raw.split())
    return to_json(batch_request.line_of(item, asked.url, number), inf_nan_mode="constants")


def _create(
    connection: Connection,
    here: Services,
    tenant: str,
    asked: BatchRequest,
    inline: InlineFile | None = None,
) -> tuple[BatchView, bool]:
    """The batch, and whether it is new. `inline` is the file that was made of its requests."""
    keep_s = here.settings.files.keep_s
    file_id, num_bytes, lines = (
        (inline.id, inline.bytes, inline.sha256) if inline else (None, 0, "")
    )
    if inline is not None:
        inline.ready(connection, keep_s)
    elif asked.input_file is not None:
        try:
            found = files.find(
                connection, file_in(asked.input_file), tenant=tenant, name="", hold=True
            )
        except NoSuchFile:
            pass  # the batch will tell
        else:
            file_id, num_bytes = found.id, found.bytes
    batch = NewBatch(
        id=new_id(),
        tenant=tenant,
        door=Door.OPENAI,
        url=asked.url,
        input_name=asked.input_file or (file_name(file_id) if file_id else ""),
        input_file_id=file_id,
        input_bytes=num_bytes,
        window_s=here.settings.job_batches.window_s,
        output_expires_s=asked.output_expires_s or keep_s,
        fingerprint=asked.fingerprint(lines),
        metadata=asked.metadata,
        idempotency_key=asked.idempotency_key,
        webhook_url=str(asked.webhook_url) if asked.webhook_url else None,
    )
    return job_batches.keep(connection, batch)


@router.get(
    "", responses=_ERRORS, summary="List batches", response_description="One page of batches."
)
async def list_batches(
    here: Here,
    who: Who,
    after: Annotated[
        str | None, Query(max_length=255, description="Begin after this batch: the last seen.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="Most batches of a page.")] = 20,
) -> BatchList:
    """Batches, newest first."""
    begin = job_batches.cursor(Door.OPENAI, after, "after")
    page = await job_batches.listed(here, Door.OPENAI, who.tenant, limit + 1, begin)
    return BatchList(**page_of(page, limit, batch_of))


@router.get(
    "/{batch_id}", responses=_ERRORS, summary="Follow a batch", response_description="The batch."
)
async def retrieve(here: Here, who: Who, batch_id: BatchId) -> Batch:
    """The batch as it is: its counts are those of this moment, and always add up."""
    return batch_of(await job_batches.find(here, Door.OPENAI, who.tenant, batch_id))


@router.post(
    "/{batch_id}/cancel",
    responses=_ERRORS | documented(HTTPStatus.CONFLICT, door=Protocol.OPENAI),
    summary="Cancel a batch",
    response_description="The batch is being cancelled.",
)
async def cancel(here: Here, who: Who, batch_id: BatchId) -> Batch:
    """Requests that run are stopped, those that wait are cancelled; what was finished is kept. May
    be repeated."""
    return batch_of(await job_batches.cancel(here, Door.OPENAI, who.tenant, batch_id))


_ENDED: Final = {
    BatchState.COMPLETED: "completed_at",
    BatchState.FAILED: "failed_at",
    BatchState.EXPIRED: "expired_at",
    BatchState.CANCELLED: "cancelled_at",
}


def batch_of(view: BatchView) -> Batch:
    counts = view.counts
    ended = {_ENDED[view.state]: _unix(view.ended_at)} if view.state in _ENDED else {}
    return Batch(
        id=name_of(view.door, view.id),
        endpoint=view.url,
        model=view.model,
        errors=_errors(view),
        input_file_id=view.input_name,
        completion_window=WINDOW,
        status=view.state,
        output_file_id=file_name(view.output_file_id) if view.output_file_id else None,
        error_file_id=file_name(view.error_file_id) if view.error_file_id else None,
        created_at=int(view.created_at.timestamp()),
        expires_at=_unix(view.expires_at),
        in_progress_at=_unix(view.in_progress_at),
        finalizing_at=_unix(view.finalizing_at),
        cancelling_at=_unix(view.cancelling_at),
        request_counts=RequestCounts(
            total=counts.total, completed=counts.succeeded, failed=counts.ended - counts.succeeded
        ),
        usage=BatchUsage(
            input_tokens=view.input_tokens,
            input_tokens_details=InputDetails(cached_tokens=view.cached_tokens),
            output_tokens=view.output_tokens,
            output_tokens_details=OutputDetails(),
            total_tokens=view.input_tokens + view.output_tokens,
        ),
        metadata=view.metadata or None,
        **ended,
    )


def _errors(view: BatchView) -> BatchErrors | None:
    if view.errors is None:
        return None
    return BatchErrors(data=[BatchError.model_validate(each) for each in view.errors])


def _unix(stamp: datetime | None) -> int | None:
    return int(stamp.timestamp()) if stamp else None
