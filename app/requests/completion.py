"""The call /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from app.requests.handling import Refused, Whole
from app.requests.prompts import Prompt, Prompts, split
from app.requests.sampled import SampledBody


class CompletionBody(SampledBody):
    """Body of /v1/completions."""

    PROMPT_FIELD: ClassVar = "prompt"

    prompt: Prompts = Field(
        description="Text, several texts, or the model's token ids of one or several.",
        examples=["A grist mill is"],
    )
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = Field(
        None,
        description="Return log probabilities with this many likeliest tokens.",
        examples=[0],
    )
    suffix: Annotated[Any, Refused("a model goes on, it does not fill in", ("",))] = Field(
        None, examples=["The end."]
    )
    add_special_tokens: Annotated[Any, Refused("send token ids instead", (True,))] = Field(
        None, examples=[False]
    )

    @property
    def prompts(self) -> list[Prompt]:
        return split(self.prompt)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs
