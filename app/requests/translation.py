"""The call /v1/translations: a text in another language."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from app.jobs import Kind
from app.requests.prompts import Prompt, Source, Text
from app.requests.sampled import SampledBody

Language = Annotated[str, Field(min_length=1, max_length=100)]


class TranslationBody(SampledBody):
    """Body of /v1/translations."""

    KIND: ClassVar = Kind.TRANSLATE
    PROMPT_FIELD: ClassVar = "input"

    input: Text | Annotated[list[Text], Field(min_length=1, max_length=2048, fail_fast=True)] = (
        Field(description="Text, or several texts.", examples=["The mill grinds the grain."])
    )
    source_language: Language | None = Field(
        None,
        description="Language of the texts, as the model calls it; what its files say when left "
        "out. Models that find it out themselves take none into account.",
        examples=["eng_Latn"],
    )
    target_language: Language | None = Field(
        None,
        description="Language of the answers; may be left out for a model that has but one.",
        examples=["deu_Latn"],
    )
    temperature: Annotated[float, Field(ge=0, le=2)] = Field(
        0.0, description="0, as it is when left out, is the likeliest translation.", examples=[0.5]
    )

    @property
    def prompts(self) -> list[Prompt]:
        given = [self.input] if isinstance(self.input, str) else self.input
        return [Source(text, self.source_language, self.target_language) for text in given]

    @property
    def num_logprobs(self) -> None:
        return None
