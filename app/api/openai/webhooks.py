"""/v1/webhook_endpoints: who receives events, by the calls of OpenAI's clients.

A test goes the way of all events: it is written here and sent by `gristmill hooks`, which alone
calls URLs of callers.
"""

from __future__ import annotations

import asyncio
import time
from http import HTTPStatus
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, Path, Query, Request

from app.api.caller import Caller, Who
from app.api.envelopes import Door
from app.api.openai.schemas_webhooks import (
    DeletedWebhookEndpoint,
    EndpointChange,
    NewEndpoint,
    Rotation,
    TestedEvent,
    WebhookEndpoint,
    WebhookEndpointList,
    WebhookEndpointTest,
    WebhookEndpointWithSecret,
    WebhookEventTypeList,
)
from app.api.pages import page_of
from app.api.problems import documented
from app.api.services import Here, Services
from app.api.wire import checked
from app.api.wire.raw_bodies import json_body
from app.errors import RequestError, Unavailable, WebhookRefused, WebhookUnreachable
from app.ids import id_in, name_of
from app.requests.storable import refuse_unstorable
from app.store import admin_log, webhook_deliveries, webhook_endpoints
from app.store.isolation import Connection
from app.store.webhook_endpoints import Endpoint
from app.webhooks.addresses import Reach
from app.webhooks.events import EVENT_TYPES
from app.webhooks.ids import ENDPOINT
from app.webhooks.urls import parse_url
from app.webhooks.vault import Vault

router = APIRouter(prefix="/v1", tags=["webhooks"])

KEEP_OLD_S: Final = 86_400.0
TEST_SPARE_S: Final = 10.0
"""A test is waited for so much longer than an attempt may take."""
LOOK_S: Final = 0.2

EndpointId = Annotated[
    str, Path(description="The endpoint's id.", examples=["we_0199e0a4f4a97c53a7b3a9f5d8f6d2ce"])
]

_ERRORS: Final = documented(
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.NOT_FOUND,
    HTTPStatus.SERVICE_UNAVAILABLE,
    door=Door.OPENAI,
)
_BODY_ERRORS: Final = _ERRORS | documented(
    HTTPStatus.CONFLICT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    door=Door.OPENAI,
)
_EXAMPLE: Final = {
    "name": "billing",
    "url": "https://example.com/hooks/gristmill",
    "event_types": ["job.completed", "job.failed"],
}


@router.get(
    "/webhook_event_types",
    responses=documented(HTTPStatus.SERVICE_UNAVAILABLE, door=Door.OPENAI),
    summary="List event types",
    response_description="The types.",
)
async def event_types(_: Who) -> WebhookEventTypeList:
    """What an endpoint may be told of."""
    return WebhookEventTypeList(data=list(EVENT_TYPES))


@router.post(
    "/webhook_endpoints",
    responses=_BODY_ERRORS,
    openapi_extra=json_body(NewEndpoint, _EXAMPLE),
    summary="Make a webhook endpoint",
    response_description="The endpoint, with its secret for the only time.",
)
async def create(request: Request, here: Here, who: Who) -> WebhookEndpointWithSecret:
    """From now on the events of these types go there, signed with the secret that is answered."""
    asked = await checked.read(request, here, NewEndpoint)
    refuse_unstorable(asked.name, "name")
    types, url = _types(asked.event_types), _url(here, asked.url)
    secret, kept = Vault(here.settings.webhooks.encryption_key).make()

    def make(connection: Connection) -> Endpoint:
        made = webhook_endpoints.create(
            connection, name=asked.name, url=url, event_types=types, secret=kept, tenant=who.tenant
        )
        _note(connection, who, "created", made.id)
        return made

    made = await here.commit(make)
    return WebhookEndpointWithSecret(**_fields(made), signing_secret=secret)


@router.get(
    "/webhook_endpoints",
    responses=_ERRORS,
    summary="List webhook endpoints",
    response_description="One page of endpoints.",
)
async def list_endpoints(
    here: Here,
    who: Who,
    after: Annotated[
        str | None, Query(max_length=255, description="Begin after this one: the last seen.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="Most endpoints of a page.")] = 20,
) -> WebhookEndpointList:
    """Endpoints, newest first."""
    begin = id_in(ENDPOINT, after) if after else None
    if after and begin is None:
        raise RequestError("'after' must be the id of an endpoint.", param="after")
    found = await here.query(
        webhook_endpoints.listed, after=begin, limit=limit + 1, tenant=who.tenant
    )
    return WebhookEndpointList(**page_of(found, limit, _told))


@router.get(
    "/webhook_endpoints/{webhook_endpoint_id}",
    responses=_ERRORS,
    summary="Retrieve a webhook endpoint",
    response_description="The endpoint, without its secret.",
)
async def retrieve(here: Here, who: Who, webhook_endpoint_id: EndpointId) -> WebhookEndpoint:
    """What is known of the endpoint."""
    id = id_in(ENDPOINT, webhook_endpoint_id)
    return _told(await here.query(webhook_endpoints.find, id, tenant=who.tenant))


@router.post(
    "/webhook_endpoints/{webhook_endpoint_id}",
    responses=_BODY_ERRORS,
    openapi_extra=json_body(EndpointChange, {"event_types": ["job.failed"]}),
    summary="Update a webhook endpoint",
    response_description="The endpoint.",
)
async def update(
    request: Request, here: Here, who: Who, webhook_endpoint_id: EndpointId
) -> WebhookEndpoint:
    """Change what is given. One that was disabled, since it had answered 410, receives again."""
    asked = await checked.read(request, here, EndpointChange)
    refuse_unstorable(asked.name, "name")
    types = _types(asked.event_types) if asked.event_types is not None else None
    url = _url(here, asked.url) if asked.url is not None else None
    id = id_in(ENDPOINT, webhook_endpoint_id)
    changes: dict[str, Any] = {"name": asked.name, "url": url, "event_types": types}
    return _told(await here.commit(webhook_endpoints.update, id, **changes, tenant=who.tenant))


@router.delete(
    "/webhook_endpoints/{webhook_endpoint_id}",
    responses=_ERRORS,
    summary="Delete a webhook endpoint",
    response_description="It is gone.",
)
async def delete(here: Here, who: Who, webhook_endpoint_id: EndpointId) -> DeletedWebhookEndpoint:
    """Nothing more goes there, and its secret is gone."""

    def remove(connection: Connection) -> None:
        id = id_in(ENDPOINT, webhook_endpoint_id)
        webhook_endpoints.delete(connection, id, tenant=who.tenant)
        _note(connection, who, "deleted", id)

    await here.commit(remove)
    return DeletedWebhookEndpoint(id=webhook_endpoint_id)


@router.post(
    "/webhook_endpoints/{webhook_endpoint_id}/rotate_secret",
    responses=_BODY_ERRORS,
    openapi_extra=json_body(Rotation, {"keep_old_secret_active_for_24_hours": True}),
    summary="Replace an endpoint's secret",
    response_description="The endpoint, with its new secret for the only time.",
)
async def rotate_secret(
    request: Request, here: Here, who: Who, webhook_endpoint_id: EndpointId
) -> WebhookEndpointWithSecret:
    """A new secret signs from now on; if that is asked, the old one beside it for a day."""
    keep_s = await kept_s(request, here)
    secret, kept = Vault(here.settings.webhooks.encryption_key).make()

    def rotate(connection: Connection) -> Endpoint:
        id = id_in(ENDPOINT, webhook_endpoint_id)
        made = webhook_endpoints.rotate(connection, id, kept, keep_s, tenant=who.tenant)
        _note(connection, who, "rotated", id)
        return made

    made = await here.commit(rotate)
    return WebhookEndpointWithSecret(**_fields(made), signing_secret=secret)


@router.post(
    "/webhook_endpoints/{webhook_endpoint_id}/test",
    responses=_BODY_ERRORS | documented(HTTPStatus.UNPROCESSABLE_ENTITY, door=Door.OPENAI),
    openapi_extra=json_body(TestedEvent, {"event_type": "job.completed"}),
    summary="Test a webhook endpoint",
    response_description="What it answered.",
)
async def test(
    request: Request, here: Here, who: Who, webhook_endpoint_id: EndpointId
) -> WebhookEndpointTest:
    """Send an event of nothing, once, and wait for the answer."""
    asked = await checked.read(request, here, TestedEvent)
    [event_type] = _types([asked.event_type], "event_type")
    id = id_in(ENDPOINT, webhook_endpoint_id)
    begun = await here.commit(webhook_deliveries.begin_test, id, event_type, tenant=who.tenant)
    status_code = await _answered(here, begun.id, who.tenant)
    return WebhookEndpointTest(
        webhook_endpoint_id=webhook_endpoint_id, event_type=event_type, status_code=status_code
    )


async def _answered(here: Services, delivery_id: UUID, tenant: str) -> int:
    """The status with which a test was answered. Raises `WebhookUnreachable`, and `Unavailable` if
    nobody has sent it."""
    until_s = time.monotonic() + here.settings.webhooks.timeout_s + TEST_SPARE_S
    while time.monotonic() < until_s:
        delivery, _ = await here.query(webhook_deliveries.find, delivery_id, tenant=tenant)
        if delivery.ended_at is not None:
            if delivery.status_code is None:
                raise WebhookUnreachable(f"The endpoint gave no answer: {delivery.error}.")
            return delivery.status_code
        await asyncio.sleep(LOOK_S)
    raise Unavailable("No `gristmill hooks` has sent the test.")


async def kept_s(request: Request, here: Services) -> float:
    """How long an old secret is to sign; a body may be left out."""
    if request.headers.get("content-length") == "0" or "content-type" not in request.headers:
        return 0.0
    asked = await checked.read(request, here, Rotation)
    return KEEP_OLD_S if asked.keep_old_secret_active_for_24_hours else 0.0


def _types(given: list[str], param: str = "event_types") -> list[str]:
    """Each once. Raises `RequestError`."""
    if not set(given) <= set(EVENT_TYPES):
        raise RequestError(f"'{param}' must be of: {', '.join(EVENT_TYPES)}.", param=param)
    return list(dict.fromkeys(given))


def _url(here: Services, text: str) -> str:
    url = parse_url(text, "url")
    try:
        Reach.of(here.settings.webhooks).check_url(url)
    except WebhookRefused as error:
        error.param = "url"
        raise
    return str(url)


def _note(connection: Connection, who: Caller, action: str, id: UUID | None) -> None:
    subject = name_of(ENDPOINT, id) if id else "?"
    admin_log.note(connection, who.actor, f"webhook_endpoint.{action}", subject, tenant=who.tenant)


def _told(endpoint: Endpoint) -> WebhookEndpoint:
    return WebhookEndpoint(**_fields(endpoint))


def _fields(endpoint: Endpoint) -> dict[str, Any]:
    disabled_at = endpoint.disabled_at
    return {
        "id": name_of(ENDPOINT, endpoint.id),
        "created_at": int(endpoint.created_at.timestamp()),
        "updated_at": int(endpoint.updated_at.timestamp()),
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": endpoint.event_types,
        "signing_secret_hint": endpoint.secret_hint,
        "disabled_at": int(disabled_at.timestamp()) if disabled_at else None,
    }
