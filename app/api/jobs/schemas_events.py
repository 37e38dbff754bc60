"""The data of a job's events."""

from __future__ import annotations

from uuid import UUID

from pydantic import BaseModel, Field

from app.api.schemas import Eta


class EventQueued(BaseModel):
    """`queued`: it waits, here."""

    position: int | None = Field(description="1 for the next one of its model.", examples=[12])
    eta: Eta | None = Field(description="When it will have ended.")


class BatchOf(BaseModel):
    """The admission batch that it was claimed in."""

    id: UUID = Field(description="The batch's id.")
    size: int = Field(description="Jobs in it.", examples=[16])


class EventStarted(BaseModel):
    """`started`, or `restarted`: the engine has begun it."""

    attempt: int = Field(description="Number of the attempt, 1 for the first.", examples=[1])
    batch: BatchOf = Field(description="Whom it runs with.")


class EventTokens(BaseModel):
    """`tokens`: what is new of one of its answers."""

    index: int = Field(description="The choice that it is of.", examples=[0])
    text: str = Field(description="Whole characters; may be empty.", examples=[" mill"])
    tokens: int = Field(description="Tokens that it was made of.", examples=[1])
    logprobs: list[float] | None = Field(
        None, description="Of each of these, if they were asked for.", examples=[[-0.21]]
    )
