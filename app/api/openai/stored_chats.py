"""/v1/chat/completions, of those that are kept: chats that were sent with `store`.

https://platform.openai.com/docs/api-reference/chat/get
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal, NoReturn
from uuid import UUID

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic_core import to_json

from app.api.answers import JSON, described, json_of
from app.api.caller import Who
from app.api.envelopes import Door
from app.api.openai.batch_request import metadata_of
from app.api.openai.calls import heard_again
from app.api.openai.schemas_stored_chats import DeletedChat, MetadataChange
from app.api.problems import documented
from app.api.purging import purged
from app.api.services import Here, Services
from app.api.wire import query, raw_bodies
from app.api.wire.raw_bodies import json_body
from app.errors import JobNotFound, JobUnreadable, MissingParameter, RequestError
from app.requests.bodies import Url, parse_stored
from app.requests.chat import ChatBody
from app.requests.chat_messages import stored_messages
from app.requests.response_input import page_of
from app.requests.storable import parse_metadata, refuse_unstorable
from app.store import stored_chats
from app.store.isolation import Connection
from app.store.stored_chats import StoredChat

router = APIRouter(prefix=Url.CHAT, tags=["openai"])

PREFIX: Final = "chatcmpl-"
MAX_CHANGE_BYTES: Final = 100_000

Order = Annotated[Literal["asc", "desc"], Query(description="Oldest first, or newest first.")]
Limit = Annotated[int, Query(ge=1, le=100, description="Most of a page.", examples=[20])]
After = Annotated[
    str | None, Query(max_length=255, description="The id of the last one of the page before.")
]
CompletionId = Annotated[
    str,
    Path(
        description="The id that the completion was answered with.",
        examples=["chatcmpl-0199e0a4-f4a9-7c53-a7b3-a9f5d8f6d2ce"],
    ),
]
_ERRORS: Final = documented(
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.INTERNAL_SERVER_ERROR,
    HTTPStatus.SERVICE_UNAVAILABLE,
    door=Door.OPENAI,
)
_BODY_ERRORS: Final = _ERRORS | documented(
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    HTTPStatus.TOO_MANY_REQUESTS,
    door=Door.OPENAI,
)
_METADATA: Final = query.family(
    "metadata",
    "Only those with these pairs among their metadata: `metadata[KEY]=VALUE`.",
    {"customer": "42"},
)


@router.get(
    "",
    **described("A page of completions.", _ERRORS),
    openapi_extra={"parameters": [_METADATA]},
    summary="List stored chat completions",
)
async def list_stored(
    request: Request,
    here: Here,
    who: Who,
    model: Annotated[
        str | None, Query(max_length=200, description="Only those of this model.")
    ] = None,
    after: After = None,
    limit: Limit = 20,
    order: Order = "asc",
) -> Response:
    """Chats that were sent with `store` and are completed, oldest first if not said otherwise."""
    refuse_unstorable(model, "model")
    wanted = {
        "model": model,
        "metadata": parse_metadata(query.members_of("metadata", request)),
        "oldest_first": order == "asc",
        "after": _mark(after) if after else None,
    }
    try:
        page = await here.query(_page, who.tenant, wanted, limit)
    except JobNotFound:
        raise _no_such_mark("completion") from None
    return Response(page, media_type=JSON)


def _page(connection: Connection, tenant: str, wanted: Mapping[str, Any], limit: int) -> bytes:
    """Not for the event loop: answers may be long."""
    ids = stored_chats.page(connection, **wanted, limit=limit + 1, tenant=tenant)
    shown = stored_chats.find(connection, ids[:limit], tenant=tenant)
    return to_json(
        {
            "object": "list",
            "data": list(map(_told, shown)),
            "first_id": _id_of(ids[0]) if ids else None,
            "last_id": _id_of(ids[:limit][-1]) if ids else None,
            "has_more": len(ids) > limit,
        }
    )


@router.get(
    "/{completion_id}", **described("It.", _ERRORS), summary="Retrieve a stored chat completion"
)
async def retrieve(here: Here, who: Who, completion_id: CompletionId) -> Response:
    """One as it was answered, with its metadata as it is now."""
    return json_of(_told(await here.read(_found, here, who.tenant, completion_id)))


@router.post(
    "/{completion_id}",
    **described("It, changed.", _BODY_ERRORS),
    openapi_extra=json_body(MetadataChange, {"metadata": {"reviewed": "yes"}}),
    summary="Update a stored chat completion",
)
async def update(request: Request, here: Here, who: Who, completion_id: CompletionId) -> Response:
    """Change its metadata: those that are given take the place of all that it has."""
    async with raw_bodies.body_of(request, MAX_CHANGE_BYTES, here.room) as raw:
        metadata = _metadata(raw_bodies.parse_json(raw))
    id = _job_id(completion_id)
    found = await here.commit(stored_chats.relabel, id, metadata, tenant=who.tenant)
    return json_of(_told(found or _not_found()))


def _metadata(body: object) -> dict[str, str]:
    if not isinstance(body, dict):
        raise RequestError("The body must be a JSON object.", param="body")
    if "metadata" not in body:
        raise MissingParameter("Missing required parameter: 'metadata'.", param="metadata")
    return metadata_of(body["metadata"])


@router.delete("/{completion_id}", responses=_ERRORS, summary="Delete a stored chat completion")
async def delete(here: Here, who: Who, completion_id: CompletionId) -> DeletedChat:
    """Remove what was asked and answered, at once and for good. What it took stays in the books."""
    found = await here.read(_found, here, who.tenant, completion_id)
    await purged(here, who, found.job_id)
    return DeletedChat(id=completion_id)


@router.get(
    "/{completion_id}/messages",
    **described("A page of messages.", _ERRORS),
    summary="List what a stored chat completion was asked",
)
async def list_messages(
    here: Here,
    who: Who,
    completion_id: CompletionId,
    after: After = None,
    limit: Limit = 20,
    order: Order = "asc",
) -> Response:
    """The messages of its request, oldest first if not said otherwise."""
    messages = await here.read(_messages, here, who.tenant, completion_id)
    try:
        return json_of(page_of(messages, order, after, limit))
    except ValueError:
        raise _no_such_mark("message") from None


def _messages(here: Services, tenant: str, completion_id: str) -> list[dict[str, Any]]:
    found = _found(here, tenant, completion_id)
    try:
        body = parse_stored(found.request or _not_found(), Url.CHAT, found.format).sent
    except RequestError:
        raise JobUnreadable() from None
    assert isinstance(body, ChatBody)
    return stored_messages(body, completion_id)


def _found(here: Services, tenant: str, completion_id: str) -> StoredChat:
    """Raises `JobNotFound`: for one that was not stored, or is not kept any more, as well."""
    job_id = _job_id(completion_id)
    with here.database.autocommit(looks_up=True) as connection:
        found = stored_chats.find(connection, [job_id], tenant=tenant)
    return found[0] if found else _not_found()


def _told(chat: StoredChat) -> dict[str, Any]:
    known = {"id": _id_of(chat.job_id), "metadata": chat.metadata}
    return chat.response | known | heard_again(chat.request or {})


def _id_of(job_id: UUID) -> str:
    return f"{PREFIX}{job_id}"


def _job_id(completion_id: str) -> UUID:
    """Raises `JobNotFound` for what is no id of a completion."""
    try:
        found = UUID(completion_id.removeprefix(PREFIX))
    except ValueError:
        _not_found()
    return found if _id_of(found) == completion_id else _not_found()


def _mark(after: str) -> UUID:
    try:
        return _job_id(after)
    except JobNotFound:
        raise _no_such_mark("completion") from None


def _no_such_mark(what: str) -> RequestError:
    return RequestError(f"There is no such {what} to begin after.", param="after")


def _not_found() -> NoReturn:
    raise JobNotFound("There is no such stored chat completion.")
