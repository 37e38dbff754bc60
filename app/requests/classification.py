"""The call /v1/classify, as vLLM has it."""

from __future__ import annotations

from typing import Annotated, ClassVar, cast

from pydantic import Field

from app.jobs import Kind, PoolingParams
from app.requests.pooled import PooledBody
from app.requests.prompts import Pair, Prompt, Prompts, Text, split

TwoTexts = Annotated[list[Text], Field(min_length=2, max_length=2, fail_fast=True)]
Pairs = Annotated[list[TwoTexts], Field(min_length=1, max_length=2048, fail_fast=True)]


class ClassifyBody(PooledBody):
    """Body of /v1/classify."""

    KIND: ClassVar = Kind.CLASSIFY
    PROMPT_FIELD: ClassVar = "input"

    input: Prompts | Pairs = Field(
        description="Text, several texts, or the model's token ids of one or several; or a list "
        "of pairs of texts, for models of pairs (does one follow from the other?).",
        examples=["The wheel turns again at last."],
    )
    use_activation: bool = Field(
        True, description="Probabilities; false gives the model's logits.", examples=[False]
    )

    @property
    def prompts(self) -> list[Prompt]:
        first = self.input[0]
        if isinstance(first, list) and isinstance(first[0], str):
            return [Pair(*pair) for pair in cast(Pairs, self.input)]
        return split(cast(Prompts, self.input))

    @property
    def pooling(self) -> PoolingParams:
        return PoolingParams(use_activation=self.use_activation)
