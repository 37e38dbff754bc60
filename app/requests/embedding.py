"""The call /v1/embeddings."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from app.engines.checkpoint.card import Card
from app.errors import RequestError
from app.jobs import Kind, PoolingParams
from app.requests.handling import Whole
from app.requests.pooled import PooledBody
from app.requests.prompts import Prompt, Prompts, split


class EmbeddingBody(PooledBody):
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
    dimensions: Annotated[Whole, Field(ge=1, le=2**31 - 1)] | None = Field(
        None,
        description="Numbers of a vector, where the model was trained to be cut (Matryoshka).",
        examples=[256],
    )
    normalize: bool = Field(
        True, description="Scale vectors to length 1; false gives them as pooled.", examples=[False]
    )
    prompt_name: Annotated[str, Field(max_length=200)] | None = Field(
        None,
        description="Which of the model's prompts to put before each text; by name, as in "
        "sentence-transformers. Left out, its default prompt, if it has one.",
        examples=["query"],
    )
    input_type: (
        Literal["query", "document", "passage", "search_query", "search_document"] | None
    ) = Field(
        None,
        description="The same by what the texts are; a model without prompts takes any.",
        examples=["query"],
    )

    @property
    def prompts(self) -> list[Prompt]:
        return split(self.input)

    @property
    def pooling(self) -> PoolingParams:
        return PoolingParams(use_activation=self.normalize, dimensions=self.dimensions)

    def prefix(self, card: Card) -> str:
        return card.prompt(self.prompt_name, self.input_type)

    def check_model(self, card: Card) -> None:
        if self.dimensions is not None:
            card.check_dimensions(self.dimensions)

    def check(self) -> None:
        if self.prompt_name is not None and self.input_type is not None:
            raise RequestError("Give prompt_name or input_type, not both.", param="input_type")
