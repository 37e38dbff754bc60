"""Fields of the calls whose answers are drawn token by token."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field, WrapValidator

from app.engines.checkpoint.generation_config import GenerationRules
from app.engines.generate.search import search_of
from app.errors import RequestError
from app.jobs import Grammar, Kind, SamplingParams
from app.requests import output_format
from app.requests.body import Body
from app.requests.handling import Ignored, Refused, Whole, all_whole
from app.requests.output_format import ResponseFormat, StructuredOutputs
from app.requests.prompts import MAX_TOKEN_ID, TokenId

MAX_COUNT: Final = 2**31 - 1
"""No count is larger."""

_LEFT_TO_THE_MODEL: Final = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
)
"""Fields for which a model's own generation_config.json may have another default."""

MAX_WORDS: Final = 128
"""Of token ids and words that are favoured, forbidden or end an output."""

Count = Annotated[Whole, Field(ge=1, le=MAX_COUNT)]


def _biases(given: Any) -> Any:
    """What is added to the logits of token ids, checked as a whole: of many wrong ones a single
    error is told."""
    if not isinstance(given, dict):
        raise ValueError("Input should be an object of numbers by token id")
    if len(given) > 1024:
        raise ValueError("It should have at most 1024 token ids")
    for token, bias in given.items():
        if not (isinstance(token, str) and token.isascii() and token.isdigit()):
            raise ValueError("Its keys should be token ids")
        if len(token) > 10 or int(token) > MAX_TOKEN_ID:
            raise ValueError("Its keys should be token ids of this model")
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not (is_number and -100 <= bias <= 100):
            raise ValueError("Its values should be numbers from -100 to 100")
    return {token: float(bias) for token, bias in given.items()}


class DrawnBody(Body):
    """What says how tokens are drawn, in the bodies of several APIs."""

    KIND: ClassVar = Kind.GENERATE

    min_tokens: Annotated[Whole, Field(ge=0, le=MAX_COUNT)] = Field(
        0,
        description="Fewest tokens: neither the model nor `stop` ends an answer before.",
        examples=[8],
    )
    temperature: Annotated[float, Field(ge=0, le=2)] = Field(
        1.0, description="0 is greedy: always the most likely token.", examples=[0.0]
    )
    top_p: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0,
        description="Sample from the smallest set of tokens with this probability.",
        examples=[0.9],
    )
    top_k: Annotated[Whole, Field(ge=-1, le=MAX_COUNT)] = Field(
        0, description="Sample from this many most likely tokens; 0 or -1 is off.", examples=[40]
    )
    min_p: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="Drop tokens less likely than this share of the likeliest.",
        examples=[0.05],
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = Field(
        0.0,
        description="Lowers the logit of every token already in the output.",
        examples=[0.5],
    )
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = Field(
        0.0,
        description="Lowers a token's logit once per occurrence in the output.",
        examples=[0.5],
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = Field(
        1.0,
        description="Divides the logits of tokens in prompt or output; 1 is off.",
        examples=[1.1],
    )
    logit_bias: Annotated[dict[str, float], BeforeValidator(_biases)] = Field(
        default_factory=dict,
        description="Added to the logits of up to 1024 token ids, from -100 to 100.",
        examples=[{"17": -100}],
    )
    bad_words: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]],
        Field(max_length=MAX_WORDS, fail_fast=True),
    ] = Field(
        default_factory=list,
        description="Up to 128 texts whose tokens are not drawn one after the other.",
        examples=[["chaff"]],
    )
    stop: str | Annotated[list[str], Field(max_length=4, fail_fast=True)] | None = Field(
        None,
        description="Up to 4 strings; the text ends before the first one met.",
        examples=[["\n\n"]],
    )
    stop_token_ids: Annotated[
        list[TokenId],
        Field(max_length=MAX_WORDS, fail_fast=True),
        WrapValidator(all_whole),
    ] = Field(
        default_factory=list,
        description="Up to 128 token ids that end an answer.",
        examples=[[13]],
    )
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None, description="Same seed, same text, whatever else is in the batch.", examples=[7]
    )


class SampledBody(DrawnBody):
    max_tokens: Count | None = Field(
        None,
        description="Most tokens to generate; the model's `default_max_tokens` when left out.",
        examples=[64],
    )
    n: Annotated[Whole, Field(ge=1, le=128)] = Field(
        1, description="How many answers; at most the model's `max_batch_size`.", examples=[2]
    )
    num_beams: Annotated[Whole, Field(ge=1, le=128)] | None = Field(
        None,
        description="Search with so many beams in place of draws, with the engine `generate`; 1 is "
        "none. Left out, the model's own settings say it where the request asks for no draws.",
        examples=[4],
    )
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = Field(
        None,
        description="With beams: above 0 favours long answers, below 0 short ones; left out, the "
        "model's own, or 1.",
        examples=[0.5],
    )
    early_stopping: bool | Literal["never"] | None = Field(
        None,
        description="With beams: true ends a search as soon as it has so many answers, `never` "
        "when none can be better, false when none is likely to be.",
        examples=[True],
    )
    ignore_eos: bool = Field(
        False,
        description="Generate `max_tokens` tokens even if the model ends before.",
        examples=[True],
    )
    response_format: ResponseFormat | None = Field(
        None,
        description="Let the output be JSON, of a schema or of none; it comes on one line.",
        examples=[{"type": "json_object"}],
    )
    structured_outputs: StructuredOutputs | None = Field(
        None,
        description="Let the output match a regular expression, or be one of several texts.",
        examples=[{"regex": "(yes|no)"}],
    )
    store: Annotated[bool | None, Ignored("answers are kept as `retention` is set")] = Field(
        None, examples=[True]
    )
    service_tier: Annotated[
        Literal["auto", "default", "flex", "scale", "priority", "fast"] | None,
        Ignored("a job has a priority"),
    ] = Field(None, examples=["flex"])
    stream_options: Annotated[
        dict[str, bool] | None, Ignored("as `stream`"), Field(max_length=16)
    ] = Field(None, examples=[{"include_usage": True}])
    prompt_cache_key: Annotated[
        str | None, Ignored("prompts share what they have in common by themselves")
    ] = Field(None, examples=["mill"])
    stream: Annotated[Any, Refused("a job has stream_events, beside its body", (False,))] = Field(
        None, examples=[True]
    )
    echo: Annotated[Any, Refused("an answer does not repeat its prompt", (False,))] = Field(
        None, examples=[True]
    )
    prompt_logprobs: Annotated[Any, Refused("give logprobs with echo, of completions")] = Field(
        None, examples=[1]
    )
    best_of: Annotated[Any, Refused("every answer drawn is given; use n", (1,))] = Field(
        None, examples=[3]
    )
    use_beam_search: Annotated[Any, Refused("num_beams says it", (False,))] = Field(
        None, examples=[True]
    )
    allowed_token_ids: Annotated[
        Any, Refused("use structured_outputs, or logit_bias with 100", ([],))
    ] = Field(None, examples=[[1, 2]])
    include_stop_str_in_output: Annotated[
        Any, Refused("a text ends before a stop string", (False,))
    ] = Field(None, examples=[True])
    skip_special_tokens: Annotated[Any, Refused("a text has no special tokens", (True,))] = Field(
        None, examples=[False]
    )
    spaces_between_special_tokens: Annotated[
        Any, Refused("a text has no special tokens", (True,))
    ] = Field(None, examples=[False])
    truncate_prompt_tokens: Annotated[Any, Refused("a prompt is never cut")] = Field(
        None, examples=[100]
    )
    return_token_ids: Annotated[Any, Refused("answers are text", (False,))] = Field(
        None, examples=[True]
    )
    return_tokens_as_token_ids: Annotated[Any, Refused("answers are text", (False,))] = Field(
        None, examples=[True]
    )

    @property
    def num_answers(self) -> int:
        return self.n

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def grammar(self) -> Grammar | None:
        """What each answer has to match, if anything."""
        return output_format.grammar_of(self.response_format, self.structured_outputs)

    @property
    def grammar_field(self) -> str:
        return output_format.field_of(self.structured_outputs)

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told at each place; None if no probability is."""
        raise NotImplementedError

    @property
    def has_answer(self) -> bool:
        """Whether what is drawn is told."""
        return True

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the tokens of the prompt."""
        return None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(
        self, max_tokens: int, bad_words: tuple[tuple[int, ...], ...], grammar: Grammar | None
    ) -> SamplingParams:
        """Of the first answer, with what depends on the model: words in its tokens, and what the
        answer has to match there."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple((int(token), bias) for token, bias in self.logit_bias.items()),
            bad_words=bad_words,
            min_tokens=self.min_tokens,
            stop=self.stops,
            stop_token_ids=tuple(self.stop_token_ids),
            seed=self.seed,
            logprobs=self.num_logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
            ignore_eos=self.ignore_eos,
            grammar=grammar,
            unset=_LEFT_TO_THE_MODEL - self.model_fields_set,
            num_beams=self._num_beams,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
        )

    @property
    def _num_beams(self) -> int | None:
        """None leaves it to the model."""
        if self.num_beams is None and (self.n > 1 or self._draw_fields):
            return 1
        return self.num_beams

    @property
    def _draw_fields(self) -> set[str]:
        """Fields that ask for draws. A temperature of 0 asks for none, whatever goes with it."""
        if "temperature" in self.model_fields_set and self.temperature == 0:
            return set()
        return self.model_fields_set & {"temperature", "top_p", "top_k", "min_p", "seed"}

    def _check_search(self) -> None:
        if (self.num_beams or 1) == 1:
            return
        if self._draw_fields:
            field = min(self._draw_fields)
            raise RequestError(f"{field} does not go with num_beams.", param=field)
        if self.grammar:
            raise RequestError(
                f"{self.grammar_field} does not go with num_beams.", param=self.grammar_field
            )
        search_of(self.sampling(1, (), None), GenerationRules())
        if self.n > (self.num_beams or 1):
            raise RequestError("n is at most num_beams.", param="n")

    def check(self) -> None:
        if not all(self.stops):
            raise RequestError("A stop string must not be empty.", param="stop")
        if self.most_tokens is not None and self.min_tokens > self.most_tokens:
            raise RequestError(
                f"min_tokens is more than {self.most_tokens_field}.", param="min_tokens"
            )
        output_format.grammar_of(self.response_format, self.structured_outputs)
        self._check_search()
