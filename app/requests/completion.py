"""The call /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from app.errors import RequestError
from app.requests.handling import Refused, Whole
from app.requests.prompts import Prompt, Prompts, split
from app.requests.sampled import MAX_COUNT, SampledBody


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
    echo: bool = Field(
        False,
        description="Let the text begin with the prompt, and `logprobs` with the prompt's tokens.",
        examples=[True],
    )
    max_tokens: Annotated[Whole, Field(ge=0, le=MAX_COUNT)] | None = Field(
        None,
        description="Most tokens to generate; the model's `default_max_tokens` when left out; "
        "with `echo` 0, for the prompt alone.",
        examples=[64],
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
    def most_tokens(self) -> int | None:
        """One has to be drawn for an engine to look at a prompt."""
        return max(1, self.max_tokens) if self.max_tokens is not None else None

    @property
    def has_answer(self) -> bool:
        return self.max_tokens != 0

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.echo else None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def check(self) -> None:
        super().check()
        if not (self.has_answer or self.echo):
            raise RequestError("max_tokens may be 0 only with echo.", param="max_tokens")
