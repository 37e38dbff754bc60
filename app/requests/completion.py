"""The call /v1/completions."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from app.requests.prompts import Prompt, Prompts, split
from app.requests.sampled import SampledBody


class CompletionBody(SampledBody):
    """Body of /v1/completions."""

    PROMPT_FIELD: ClassVar = "prompt"

    prompt: Prompts = Field(
        description="Text, several texts, or the model's token ids of one or several.",
        examples=["A grist mill is"],
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None,
        description="Return log probabilities with this many likeliest tokens.",
        examples=[0],
    )

    @property
    def prompts(self) -> list[Prompt]:
        return split(self.prompt)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs
