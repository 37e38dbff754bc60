"""Webhook endpoints as OpenAI's clients know them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from app.requests.part import Part
from app.webhooks.events import EVENT_TYPES
from app.webhooks.urls import MAX_URL

MAX_NAME = 200

_Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
_Url = Annotated[str, Field(max_length=MAX_URL)]
_Types = Annotated[list[str], Field(min_length=1, max_length=2 * len(EVENT_TYPES), fail_fast=True)]


class NewEndpoint(Part):
    """What is asked for with an endpoint."""

    name: _Name = Field(description="A word of yours for it.", examples=["billing"])
    url: _Url = Field(
        description="Where events go.", examples=["https://example.com/hooks/gristmill"]
    )
    event_types: _Types = Field(
        description="Which events; GET /v1/webhook_event_types lists them.",
        examples=[["job.completed", "job.failed"]],
    )


class EndpointChange(Part):
    """What is to change; what is left out stays."""

    name: _Name | None = Field(None, description="A word of yours for it.")
    url: _Url | None = Field(None, description="Where events go from now on, pending ones too.")
    event_types: _Types | None = Field(None, description="Which events, all of them.")


class Rotation(Part):
    """How a secret is replaced."""

    keep_old_secret_active_for_24_hours: bool = Field(
        False, description="Whether the old one signs beside the new one for a day."
    )


class TestedEvent(Part):
    """What a test sends."""

    event_type: str = Field(description="The event's type.", examples=["job.completed"])


class WebhookEndpoint(BaseModel):
    """A receiver of events."""

    id: str = Field(description="Its id.", examples=["we_0199e0a4f4a97c53a7b3a9f5d8f6d2ce"])
    object: Literal["webhook_endpoint"] = Field(
        "webhook_endpoint", description="Always `webhook_endpoint`."
    )
    created_at: int = Field(description="When it was made, in Unix time.")
    updated_at: int = Field(description="When it, or its secret, was last changed.")
    name: str = Field(description="A word of yours for it.")
    url: str = Field(description="Where events go.")
    event_types: list[str] = Field(description="Which events.")
    signing_secret_hint: str = Field(
        description="What of its secret may be shown.", examples=["whsec_...a1b2"]
    )
    disabled_at: int | None = Field(
        None, description="When it answered 410; nothing goes there until it is updated."
    )


class WebhookEndpointWithSecret(WebhookEndpoint):
    """The same with its secret, for the only time."""

    signing_secret: str = Field(description="Verifies its events. It is not shown again.")


class WebhookEndpointList(BaseModel):
    """A page of endpoints."""

    object: Literal["list"] = Field("list", description="Always `list`.")
    data: list[WebhookEndpoint] = Field(description="The endpoints.")
    first_id: str | None = Field(None, description="Id of the first.")
    last_id: str | None = Field(None, description="Id of the last: the next page's `after`.")
    has_more: bool = Field(description="Whether there are more behind it.")


class DeletedWebhookEndpoint(BaseModel):
    """An endpoint that was deleted."""

    id: str = Field(description="Its id.")
    object: Literal["webhook_endpoint.deleted"] = Field(
        "webhook_endpoint.deleted", description="Always `webhook_endpoint.deleted`."
    )
    deleted: Literal[True] = Field(True, description="Always true.")


class WebhookEndpointTest(BaseModel):
    """What an endpoint answered to a test."""

    object: Literal["webhook_endpoint.test"] = Field(
        "webhook_endpoint.test", description="Always `webhook_endpoint.test`."
    )
    webhook_endpoint_id: str = Field(description="The endpoint's id.")
    event_type: str = Field(description="The type of the event that was sent.")
    status_code: int = Field(description="The status that it answered with.", examples=[204])
    success: Literal[True] = Field(
        True, description="Always true: it answered. `status_code` says how."
    )


class WebhookEventTypeList(BaseModel):
    """The events that there are."""

    object: Literal["list"] = Field("list", description="Always `list`.")
    data: list[str] = Field(description="Their types.", examples=[["job.completed"]])
