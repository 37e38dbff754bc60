"""Stored chat completions as OpenAI's clients know them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class MetadataChange(BaseModel):
    """What of a stored chat completion may be changed."""

    metadata: dict[str, str] | None = Field(
        description="Up to 16 texts in place of those that it has; null for none.",
        examples=[{"reviewed": "yes"}],
    )


class DeletedChat(BaseModel):
    """A stored chat completion that was deleted."""

    id: str = Field(description="Its id.")
    object: Literal["chat.completion.deleted"] = Field(
        "chat.completion.deleted", description="Always `chat.completion.deleted`."
    )
    deleted: Literal[True] = Field(True, description="Always true.")
