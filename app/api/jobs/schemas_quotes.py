"""What a dry run answers with, field by field."""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

from pydantic import BaseModel, Field

from app.api.envelopes import Problem
from app.api.schemas import Money, WhyUnknown
from app.jobs import Kind

DeadlineOutlook = Literal["met", "at_risk", "missed"]


class Expected(BaseModel):
    """A time as it is likely."""

    p50: datetime = Field(description="As likely before as after this.")
    p90: datetime = Field(description="Nine of ten such jobs have it by then.")


class Between(BaseModel):
    """Two ends that at least eight of ten such jobs stay between."""

    low: Money = Field(description="Nine of ten cost no less.", examples=["0.000004120"])
    high: Money = Field(description="Nine of ten cost no more.", examples=["0.000009870"])


class QuotedTokens(BaseModel):
    """Tokens, as they are counted."""

    input_tokens: int | None = Field(description="Tokens of the prompt.", examples=[31])
    max_output_tokens: int | None = Field(
        description="Most tokens that it may generate, all its answers together.", examples=[64]
    )


class QuotedCost(BaseModel):
    """What it is likely to cost, at the prices that this API is configured with."""

    amount: Between | None = Field(
        description="Device time at its price; null as long as no job of the model has ended."
    )
    charge: Between | None = Field(
        description="The same usage by the price's tariff for tokens; null if there is none."
    )
    currency: str = Field(description="ISO 4217 code.", examples=["EUR"])
    price_id: str = Field(description="The entry of prices.toml.", examples=["cpu"])


class Quote(BaseModel):
    """What a job would meet if it were submitted now. Nothing is stored, and nothing is held for
    it."""

    object: Literal["quote"] = Field("quote", description="Always `quote`.")
    url: str = Field(description="Which call it is.", examples=["/v1/chat/completions"])
    kind: Kind = Field(description="What the model does.")
    model: str = Field(description="The model asked.", examples=["smollm2-135m-instruct"])
    priority: int = Field(description="0 is served first, 9 last; -1 is waited for.", examples=[0])
    tokens: QuotedTokens = Field(description="Its tokens.")
    position: int | None = Field(
        description="The place that it would have among those that wait for its model, 1 for the "
        "next one; null if it is not due yet.",
        examples=[12],
    )
    start: Expected | None = Field(description="When the engine would begin it.")
    finish: Expected | None = Field(description="When it would have ended.")
    reason: WhyUnknown
    load_s: float | None = Field(
        description="Where no worker that serves the model is up: what it takes to load, in "
        "seconds, as measured. The times hold what is left of that.",
        examples=[None],
    )
    deadline: datetime | None = Field(description="When it would expire.")
    deadline_outlook: DeadlineOutlook | None = Field(
        description="Whether it would end before that: most likely (met: its p90 does), perhaps "
        "(at_risk), or rather not (missed: its p50 does not). Null without a deadline, or without "
        "a time.",
        examples=["met"],
    )
    cost: QuotedCost | None = Field(description="What it would cost; null without a price.")
    known_as: UUID | None = Field(
        description="The job that has its idempotency key and request already: a submission would "
        "be answered with that one."
    )


class QuoteItem(BaseModel):
    """What would become of one job of a bulk submission."""

    status: int = Field(
        description="202 for a job that would be accepted, 200 for one known by its key, else the "
        "error's.",
        examples=[202],
    )
    quote: Quote | None = Field(None, description="What it would meet, unless it is refused.")
    error: Problem | None = Field(None, description="Why it would be refused.")


class BulkQuote(BaseModel):
    """One item for each job, in the order they were sent, and the sum of all."""

    object: Literal["bulk_quote"] = Field("bulk_quote", description="Always `bulk_quote`.")
    accepted: int = Field(description="Jobs that would be accepted, or are known.", examples=[2])
    refused: int = Field(description="Jobs that would not be stored.", examples=[1])
    finish: Expected | None = Field(
        description="When the last of them would have ended; null if that is not known of all."
    )
    costs: list[QuotedCost] = Field(
        description="What those not known before would cost together, by price. The ends are sums "
        "of theirs, so that the whole is still less likely to be outside."
    )
    items: list[QuoteItem] = Field(description="What would become of each.")
