"""The messages of a chat."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from app.requests.part import Part


class ChatMessage(Part):
    role: Literal["system", "user", "assistant"] = Field(
        description="Who speaks.", examples=["user"]
    )
    content: Annotated[str, Field(min_length=1)] = Field(
        description="What is said; plain text.", examples=["Name three uses of a grist mill."]
    )
    name: Annotated[str, Field(max_length=64)] | None = Field(
        None, description="Accepted for compatibility and not used.", examples=["alice"]
    )
