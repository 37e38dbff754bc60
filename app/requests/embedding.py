"""The call /v1/embeddings."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from app.jobs import Kind
from app.requests.body import Body
from app.requests.prompts import Prompt, Prompts, split


class EmbeddingBody(Body):
    """Body of /v1/embeddings."""

    KIND: ClassVar = Kind.EMBED
    PROMPT_FIELD: ClassVar = "input"

    input: Prompts = Field(
        description="Text, several texts, or the model's token ids of one or several.",
        examples=["water wheel"],
    )
    encoding_format: Literal["float", "base64"] = Field(
        "float",
        description="How vectors are written: numbers, or base64 of little-endian float32.",
        examples=["base64"],
    )

    @property
    def prompts(self) -> list[Prompt]:
        return split(self.input)
