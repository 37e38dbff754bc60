"""/v1/webhook_deliveries: what became of events; and the secret that signs for webhook_url."""

from __future__ import annotations

from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Final, Literal
from uuid import UUID

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, Field

from app.api.caller import Who
from app.api.openai.schemas_webhooks import Rotation
from app.api.openai.webhooks import kept_s
from app.api.pages import page_of
from app.api.problems import documented
from app.api.services import Here
from app.api.wire.raw_bodies import json_body
from app.errors import RequestError
from app.ids import id_in, name_of
from app.requests.storable import refuse_unstorable
from app.store import admin_log, webhook_deliveries, webhook_endpoints
from app.store.isolation import Connection
from app.store.webhook_deliveries import Delivery
from app.webhooks.ids import DELIVERY, ENDPOINT, EVENT
from app.webhooks.vault import Vault

router = APIRouter(prefix="/v1", tags=["webhooks"])

MAX_PAGE: Final = 100

DeliveryId = Annotated[
    str, Path(description="The delivery's id.", examples=["wd_0199e0a4f4a97c53a7b3a9f5d8f6d2ce"])
]


class WebhookAttempt(BaseModel):
    """An attempt to deliver."""

    number: int = Field(description="1 for the first.", examples=[1])
    started_at: datetime = Field(description="When it began.")
    took_ms: float = Field(description="Until the answer, in ms.", examples=[41.3])
    status_code: int | None = Field(description="Of the answer; null if there was none.")
    error: str | None = Field(description="Why it failed; null if it did not.")


class WebhookDelivery(BaseModel):
    """An event on its way to one receiver."""

    id: str = Field(description="Its id.", examples=["wd_0199e0a4f4a97c53a7b3a9f5d8f6d2ce"])
    object: Literal["webhook_delivery"] = Field(
        "webhook_delivery", description="Always `webhook_delivery`."
    )
    event_id: str = Field(description="The event's id: its `webhook-id`.")
    type: str = Field(description="The event's type.", examples=["job.completed"])
    object_id: str = Field(description="What it tells of: its `data.id`.")
    endpoint_id: str | None = Field(description="Its endpoint; null for a `webhook_url`.")
    url: str = Field(description="Where it goes.")
    state: Literal["pending", "delivered", "failed"] = Field(description="What became of it.")
    is_test: bool = Field(description="Whether it is a test.")
    attempts: int = Field(description="Attempts that were begun.", examples=[2])
    created_at: datetime = Field(description="When the event happened.")
    next_at: datetime | None = Field(description="When it is tried again; null once it ended.")
    ended_at: datetime | None = Field(description="When it was delivered or given up.")
    status_code: int | None = Field(description="Of the last answer; null if there was none.")
    error: str | None = Field(description="Why the last attempt failed; null if it did not.")


class WebhookDeliveryDetails(WebhookDelivery):
    """The same with its attempts."""

    history: list[WebhookAttempt] = Field(description="Attempts whose end was seen.")


class WebhookDeliveryList(BaseModel):
    """A page of deliveries."""

    object: Literal["list"] = Field("list", description="Always `list`.")
    data: list[WebhookDelivery] = Field(description="The deliveries.")
    first_id: str | None = Field(None, description="Id of the first.")
    last_id: str | None = Field(None, description="Id of the last: the next page's `after`.")
    has_more: bool = Field(description="Whether there are more behind it.")


class WebhookSecret(BaseModel):
    """What signs for `webhook_url`, shown once."""

    object: Literal["webhook_secret"] = Field(
        "webhook_secret", description="Always `webhook_secret`."
    )
    signing_secret: str = Field(description="Verifies the events. It is not shown again.")
    signing_secret_hint: str = Field(description="What of it may be shown.")
    updated_at: datetime = Field(description="Now.")


_ERRORS: Final = documented(
    HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE
)


@router.get(
    "/webhook_deliveries",
    responses=_ERRORS,
    summary="List deliveries of webhooks",
    response_description="One page of deliveries.",
)
async def list_deliveries(
    here: Here,
    who: Who,
    state: Annotated[
        Literal["pending", "delivered", "failed"] | None,
        Query(description="Only those in this state."),
    ] = None,
    endpoint_id: Annotated[
        str | None, Query(max_length=255, description="Only those to this endpoint.")
    ] = None,
    object_id: Annotated[
        str | None,
        Query(max_length=255, description="Only those that tell of this job, response or batch."),
    ] = None,
    after: Annotated[
        str | None, Query(max_length=255, description="Begin after this one: the last seen.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Most of a page.")] = 20,
) -> WebhookDeliveryList:
    """Deliveries, newest first."""
    refuse_unstorable(object_id, "object_id")
    asked: dict[str, UUID | None] = {}
    for name, prefix, given in (("after", DELIVERY, after), ("endpoint_id", ENDPOINT, endpoint_id)):
        asked[name] = id_in(prefix, given) if given else None
        if given and asked[name] is None:
            raise RequestError(f"'{name}' must be an id that begins with {prefix}.", param=name)

    found = await here.query(
        webhook_deliveries.listed,
        state=state,
        object_id=object_id,
        limit=limit + 1,
        tenant=who.tenant,
        **asked,
    )
    return WebhookDeliveryList(**page_of(found, limit, _told))


@router.get(
    "/webhook_deliveries/{delivery_id}",
    responses=_ERRORS,
    summary="Look at the delivery of a webhook",
    response_description="The delivery and its attempts.",
)
async def retrieve(here: Here, who: Who, delivery_id: DeliveryId) -> WebhookDeliveryDetails:
    """What became of it, attempt by attempt."""
    id = id_in(DELIVERY, delivery_id)
    delivery, attempts = await here.query(webhook_deliveries.find, id, tenant=who.tenant)
    return WebhookDeliveryDetails(
        **_told(delivery).model_dump(),
        history=[
            WebhookAttempt(
                number=each.number,
                started_at=each.started_at,
                took_ms=round(each.took_ms, 3),
                status_code=each.status_code,
                error=each.error,
            )
            for each in attempts
        ],
    )


@router.post(
    "/webhook_deliveries/{delivery_id}/replay",
    responses=_ERRORS | documented(HTTPStatus.CONFLICT),
    summary="Deliver a webhook again",
    response_description="The delivery, pending.",
)
async def replay(here: Here, who: Who, delivery_id: DeliveryId) -> WebhookDelivery:
    """Deliver it at once, be it delivered, failed or pending, and with all its attempts. The event
    keeps its id."""
    id = id_in(DELIVERY, delivery_id)
    return _told(await here.commit(webhook_deliveries.replay, id, tenant=who.tenant))


@router.post(
    "/webhook_secret",
    responses=documented(
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        HTTPStatus.SERVICE_UNAVAILABLE,
    ),
    openapi_extra=json_body(Rotation, {"keep_old_secret_active_for_24_hours": True}),
    summary="Make the secret that signs for webhook_url",
    response_description="The secret, for the only time.",
)
async def make_secret(request: Request, here: Here, who: Who) -> WebhookSecret:
    """Events that go to the `webhook_url` of a job or a batch are signed with it from now on, in
    place of the one before."""
    keep_s = await kept_s(request, here)
    secret, kept = Vault(here.settings.webhooks.encryption_key).make()

    def rotate(connection: Connection) -> datetime:
        at = webhook_endpoints.rotate_own(connection, kept, keep_s, tenant=who.tenant)
        told = ("webhook_secret.rotated", "webhook_url")
        admin_log.note(connection, who.actor, *told, tenant=who.tenant)
        return at

    at = await here.commit(rotate)
    return WebhookSecret(signing_secret=secret, signing_secret_hint=kept.hint, updated_at=at)


def _told(delivery: Delivery) -> WebhookDelivery:
    endpoint_id = delivery.endpoint_id
    return WebhookDelivery.model_validate(
        {
            "id": name_of(DELIVERY, delivery.id),
            "event_id": name_of(EVENT, delivery.event_id),
            "type": delivery.type,
            "object_id": delivery.object_id,
            "endpoint_id": name_of(ENDPOINT, endpoint_id) if endpoint_id else None,
            "url": delivery.url,
            "state": delivery.state,
            "is_test": delivery.is_test,
            "attempts": delivery.attempts,
            "created_at": delivery.created_at,
            "next_at": delivery.next_at,
            "ended_at": delivery.ended_at,
            "status_code": delivery.status_code,
            "error": delivery.error,
        }
    )
