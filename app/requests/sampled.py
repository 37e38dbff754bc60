"""Fields of the calls whose answers are drawn token by token."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from app.errors import RequestError
from app.jobs import Grammar, Kind, SamplingParams, int64
from app.requests import output_format
from app.requests.body import Body
from app.requests.output_format import ResponseFormat, StructuredOutputs

MAX_COUNT: Final = 2**31 - 1
"""No count is larger."""


class SampledBody(Body):
    KIND: ClassVar = Kind.GENERATE

    max_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = Field(
        None,
        description="Most tokens to generate; the model's `default_max_tokens` when left out.",
        examples=[64],
    )
    temperature: Annotated[float, Field(ge=0, le=2)] = Field(
        1.0, description="0 is greedy: always the most likely token.", examples=[0.0]
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="Sample from the smallest set of tokens with this probability.",
        examples=[0.9],
    )
    top_k: Annotated[int, Field(ge=0, le=MAX_COUNT)] = Field(
        0, description="Sample from this many most likely tokens; 0 is off.", examples=[40]
    )
    min_p: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="Drop tokens less likely than this share of the likeliest.",
        examples=[0.05],
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = Field(
        0.0,
        description="Taken from the logit of every token already in the output.",
        examples=[0.0],
    )
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = Field(
        0.0,
        description="Taken from a token's logit once per occurrence in the output.",
        examples=[0.0],
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = Field(
        1.0,
        description="Divides the logits of tokens in prompt or output; 1 is off.",
        examples=[1.0],
    )
    stop: str | Annotated[list[str], Field(max_length=4, fail_fast=True)] | None = Field(
        None,
        description="Up to 4 strings; the text ends before the first one met.",
        examples=[["\n\n"]],
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None, description="Same seed, same text, whatever else is in the batch.", examples=[7]
    )
    n: Annotated[int, Field(ge=1, le=128)] = Field(
        1, description="How many answers; at most the model's `max_batch_size`.", examples=[1]
    )
    ignore_eos: bool = Field(
        False,
        description="Generate `max_tokens` tokens even if the model ends before.",
        examples=[False],
    )
    response_format: ResponseFormat | None = Field(
        None,
        description="Let the output be JSON, of a schema or of none; it comes on one line.",
        examples=[{"type": "json_object"}],
    )
    structured_outputs: StructuredOutputs | None = Field(
        None,
        description="Let the output match a regular expression.",
        examples=[{"regex": "(yes|no)"}],
    )
    stream: Literal[False] | None = Field(
        None,
        description="Queued jobs are polled, not streamed: only false is accepted.",
        examples=[False],
    )

    @property
    def num_answers(self) -> int:
        return self.n

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def grammar(self) -> Grammar | None:
        return output_format.grammar_of(self.response_format, self.structured_outputs)

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told at each place; None if no probability is."""
        raise NotImplementedError

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, max_tokens: int, answer: int) -> SamplingParams:
        """With a seed, each of the n answers gets a seed of its own, so that they differ."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            stop=self.stops,
            seed=None if self.seed is None else int64(self.seed + answer),
            logprobs=self.num_logprobs,
            ignore_eos=self.ignore_eos,
            grammar=self.grammar,
        )

    def check(self) -> None:
        if not all(self.stops):
            raise RequestError("A stop string must not be empty.", param="stop")
