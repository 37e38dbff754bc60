"""The call /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from app.errors import RequestError
from app.requests.conversation import ChatMessage
from app.requests.prompts import Prompt
from app.requests.sampled import MAX_COUNT, SampledBody


class ChatBody(SampledBody):
    """Body of /v1/chat/completions."""

    PROMPT_FIELD: ClassVar = "messages"

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000, fail_fast=True)] = (
        Field(description="The conversation so far, oldest first.")
    )
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = Field(
        None, description="The newer name of `max_tokens`; give one of the two.", examples=[64]
    )
    logprobs: bool | None = Field(
        None, description="Return the log probability of each output token.", examples=[False]
    )
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None,
        description="With `logprobs`: this many likeliest tokens at each place.",
        examples=[0],
    )

    @property
    def prompts(self) -> list[Prompt]:
        return [tuple(self.messages)]

    @property
    def most_tokens(self) -> int | None:
        newer = self.max_completion_tokens
        return newer if newer is not None else self.max_tokens

    @property
    def most_tokens_field(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        super().check()
        if self.max_tokens and self.max_completion_tokens:
            raise RequestError(
                "Give max_tokens or max_completion_tokens, not both.",
                param="max_completion_tokens",
            )
