"""Batches as Anthropic's clients know them."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field

from app.requests.messages import MessagesBody

_ID = "msgbatch_0199e0a4f4a97c53a7b3a9f5d8f6d2ce"
_WHEN = "2027-01-31T12:00:00Z"


class MessageBatchRequest(BaseModel):
    """One of the requests of a batch."""

    custom_id: str = Field(
        pattern=r"^[a-zA-Z0-9_-]{1,64}$",
        description="What its result is told by; no other of the batch has the same.",
        examples=["request-1"],
    )
    params: MessagesBody = Field(description="The body of a call of `/v1/messages`.")


class MessageBatchBody(BaseModel):
    """What a batch is asked with."""

    requests: list[MessageBatchRequest] = Field(
        min_length=1, description="The requests; what is wrong with one is told by its result."
    )


class MessageBatchCounts(BaseModel):
    """Requests by what became of them. They are all `processing` until the batch has ended."""

    processing: int = Field(description="Not over.", examples=[0])
    succeeded: int = Field(description="Answered.", examples=[95])
    errored: int = Field(description="Wrong, or failed.", examples=[2])
    canceled: int = Field(description="Cancelled before they ended.", examples=[2])
    expired: int = Field(description="Not over when the batch's time was.", examples=[1])


class MessageBatch(BaseModel):
    id: str = Field(description="The batch's id.", examples=[_ID])
    type: Literal["message_batch"] = Field("message_batch", description="Always the same.")
    processing_status: Literal["in_progress", "canceling", "ended"] = Field(
        description="Whether it runs, is being cancelled, or is over.", examples=["ended"]
    )
    request_counts: MessageBatchCounts = Field(description="What became of its requests.")
    created_at: datetime = Field(description="Accepted.", examples=[_WHEN])
    expires_at: datetime = Field(
        description="What is not over then expires.", examples=["2027-02-01T12:00:00Z"]
    )
    ended_at: datetime | None = Field(description="Over; null if it is not.", examples=[_WHEN])
    cancel_initiated_at: datetime | None = Field(
        description="Asked to be cancelled; null if it was not.", examples=[None]
    )
    archived_at: datetime | None = Field(None, description="Always null.", examples=[None])
    results_url: str | None = Field(
        description="Where its results are; null until it is over.",
        examples=[f"http://127.0.0.1:8000/v1/messages/batches/{_ID}/results"],
    )


class MessageBatchList(BaseModel):
    """A page of batches, newest first."""

    data: list[MessageBatch] = Field(description="The batches.")
    has_more: bool = Field(description="Whether there are more.", examples=[False])
    first_id: str | None = Field(description="Of the first one here.", examples=[_ID])
    last_id: str | None = Field(description="Of the last one here.", examples=[_ID])


class DeletedMessageBatch(BaseModel):
    id: str = Field(description="The batch's id.", examples=[_ID])
    type: Literal["message_batch_deleted"] = Field(
        "message_batch_deleted", description="Always the same."
    )
