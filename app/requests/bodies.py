"""What a producer asks: the body of an OpenAI-style call, checked, and what it means to an engine.

A request is `(url, body)`. The url follows from the field present when it is left out:
`messages` → /v1/chat/completions, `prompt` → /v1/completions, `input` → /v1/embeddings. Field
names and meanings are those of the OpenAI API, with vLLM's names for the sampling parameters it
lacks (top_k, min_p, repetition_penalty, ignore_eos).

Pure: limits that depend on a model's tokenizer are checked by `app.engines.tokenizer`.
"""

from __future__ import annotations

import enum
import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError

from app.errors import LaterFormat, RequestError, UrlNotFound
from app.jobs import Grammar, Kind, SamplingParams, int64
from app.requests import output_format
from app.requests.output_format import ResponseFormat, StructuredOutputs
from app.requests.part import UNKNOWN_FIELD, Part

FORMAT: Final = 1
"""Version of the format of stored requests. Raise it with every field or value that code of before
would refuse: rows of a later format are left to workers that know it."""

MAX_INT: Final = 2**31 - 1
"""No count or token id is larger."""


def readable(format: int) -> bool:
    """Whether requests of this format can be read here."""
    return format <= FORMAT


class Url(enum.StrEnum):
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"

    @property
    def kind(self) -> Kind:
        return Kind.EMBED if self is Url.EMBEDDINGS else Kind.GENERATE


class _Body(Part):
    model: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None,
        description="Name of a configured model; the default model of this kind when left out.",
        examples=["smollm2-135m-instruct"],
    )
    parse_special: bool = Field(
        False,
        description="Take what looks like the model's special tokens, as `<|im_end|>`, for these; "
        "otherwise it is text like any other. For prompts that are rendered elsewhere.",
        examples=[False],
    )
    user: Annotated[str, Field(max_length=200)] | None = Field(
        None, description="Accepted for compatibility and not used.", examples=["user-42"]
    )


class _Sampled(_Body):
    max_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = Field(
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
    top_k: Annotated[int, Field(ge=0, le=MAX_INT)] = Field(
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


class ChatMessage(Part):
    role: Literal["system", "user", "assistant"] = Field(
        description="Who speaks.", examples=["user"]
    )
    content: Annotated[str, Field(min_length=1)] = Field(
        description="What is said; plain text.", examples=["Name three uses of a grist mill."]
    )
    name: Annotated[str, Field(max_length=64)] | None = Field(
        None, description="Accepted for compatibility and not used.", examples=["alice"]
    )


class ChatBody(_Sampled):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000, fail_fast=True)] = (
        Field(description="The conversation so far, oldest first.")
    )
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = Field(
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


# Without `fail_fast` two megabytes of wrong items are half a million errors, which take half a
# gigabyte, to tell the first.
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=MAX_INT)]], Field(min_length=1, fail_fast=True)
]
Text = Annotated[str, Field(min_length=1)]
Prompts = (
    Text
    | TokenIds
    | Annotated[list[Text], Field(min_length=1, max_length=2048, fail_fast=True)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=2048, fail_fast=True)]
)


class CompletionBody(_Sampled):
    """Body of /v1/completions."""

    prompt: Prompts = Field(
        description="Text, several texts, or the model's token ids of one or several.",
        examples=["A grist mill is"],
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None,
        description="Return log probabilities with this many likeliest tokens.",
        examples=[0],
    )


class EmbeddingBody(_Body):
    """Body of /v1/embeddings."""

    input: Prompts = Field(
        description="Text, several texts, or the model's token ids of one or several.",
        examples=["water wheel"],
    )
    encoding_format: Literal["float", "base64"] = Field(
        "float",
        description="How vectors are written: numbers, or base64 of little-endian float32.",
        examples=["float"],
    )


Body = ChatBody | CompletionBody | EmbeddingBody
BODIES: Final[dict[Url, type[Body]]] = {
    Url.CHAT: ChatBody,
    Url.COMPLETIONS: CompletionBody,
    Url.EMBEDDINGS: EmbeddingBody,
}
_URL_BY_FIELD: Final = {
    "messages": Url.CHAT,
    "prompt": Url.COMPLETIONS,
    "input": Url.EMBEDDINGS,
}

Prompt = str | tuple[int, ...] | tuple[ChatMessage, ...]
"""One prompt: text, token ids, or a conversation still to be put through the chat template."""


@dataclass(frozen=True)
class Request:
    """A checked request. `raw` is the body as it was sent, without nulls and with a schema as
    JSON text: what is stored and fingerprinted."""

    url: Url
    body: Body
    raw: dict[str, Any]

    @property
    def kind(self) -> Kind:
        return self.url.kind

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of url and body in canonical JSON: equal for equal requests."""
        text = json.dumps([self.url, self.raw], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def prompts(self) -> list[Prompt]:
        """The distinct prompts, in order; with `n` each is answered n times."""
        match self.body:
            case ChatBody(messages=messages):
                return [tuple(messages)]
            case CompletionBody(prompt=given) | EmbeddingBody(input=given):
                return _split(given)

    @property
    def num_answers(self) -> int:
        """Answers per prompt."""
        return 1 if isinstance(self.body, EmbeddingBody) else self.body.n

    @property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.num_answers

    @property
    def max_tokens(self) -> int | None:
        """The output limit the caller asked for, if any."""
        match self.body:
            case ChatBody(max_completion_tokens=newer, max_tokens=older):
                return newer if newer is not None else older
            case CompletionBody(max_tokens=given):
                return given
            case _:
                return None

    @property
    def grammar(self) -> Grammar | None:
        """What each answer has to match, if anything."""
        if isinstance(self.body, EmbeddingBody):
            return None
        return output_format.grammar_of(self.body.response_format, self.body.structured_outputs)

    def sampling(self, max_tokens: int, answer: int = 0) -> SamplingParams | None:
        """Sampling of answer number `answer`, or None for an embedding.

        With a seed, each of the n answers gets a seed of its own, so that they differ.
        """
        body = self.body
        if isinstance(body, EmbeddingBody):
            return None
        if isinstance(body, ChatBody):
            logprobs = (body.top_logprobs or 0) if body.logprobs else None
        else:
            logprobs = body.logprobs
        stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            min_p=body.min_p,
            presence_penalty=body.presence_penalty,
            frequency_penalty=body.frequency_penalty,
            repetition_penalty=body.repetition_penalty,
            stop=stop,
            seed=None if body.seed is None else int64(body.seed + answer),
            logprobs=logprobs,
            ignore_eos=body.ignore_eos,
            grammar=self.grammar,
        )


def parse(raw: object, url: str | None = None) -> Request:
    """Check a body and return the request. A known field that is null counts as left out: many
    clients write all that they know.

    Raises `RequestError` whose `param` names the first wrong field and whose message never quotes
    the value: it may be a prompt.
    """
    if not isinstance(raw, dict):
        raise RequestError("The request body must be a JSON object.", param="body")
    raw = {name: it for name, it in raw.items() if it is not None or name not in _TOP_FIELDS}
    known_url = _url(raw, url)
    try:
        body = BODIES[known_url].model_validate(raw)
    except ValidationError as error:
        raise first_problem(error, raw) from None
    if not isinstance(body, EmbeddingBody):
        raw = output_format.checked(raw, body.response_format, body.structured_outputs)
    refuse_unstorable(raw)
    request = Request(known_url, body, raw)
    if isinstance(body, ChatBody) and body.max_tokens and body.max_completion_tokens:
        raise RequestError(
            "Give max_tokens or max_completion_tokens, not both.", param="max_completion_tokens"
        )
    if any(not stop for stop in _stops(body)):
        raise RequestError("A stop string must not be empty.", param="stop")
    return request


def parse_stored(raw: object, url: str | None, format: int) -> Request:
    """The request of a row, whoever wrote it.

    Raises `LaterFormat` if it is for other workers to read, and `RequestError` if it is wrong.
    """
    if not readable(format):
        raise LaterFormat()
    return parse(raw, url)


def parse_metadata(given: object) -> dict[str, str]:
    """Check a job's metadata: up to 16 pairs of text, keys to 64 and values to 512 characters."""
    if given is None:
        return {}
    if not isinstance(given, dict) or len(given) > 16:
        raise RequestError("metadata must be an object of at most 16 pairs.", param="metadata")
    for key, value in given.items():
        if not (isinstance(key, str) and 0 < len(key) <= 64):
            raise RequestError("A key of metadata has 1 to 64 characters.", param="metadata")
        if not (isinstance(value, str) and len(value) <= 512):
            raise RequestError(
                "A value of metadata is text of at most 512 characters.", param="metadata"
            )
    refuse_unstorable(given, "metadata")
    return given


def refuse_unstorable(value: object, *path: str) -> None:
    """Raise `RequestError` if a text in `value`, at any depth, cannot be kept as Postgres jsonb.

    That is text with a NUL character or half of a surrogate pair: JSON can spell both. `path`
    leads to `value` and names it in the error.
    """
    text = json.dumps(value, ensure_ascii=False)
    if "\\u0000" in text or not is_unicode(text):  # so it may be: look closely
        _refuse_unstorable(value, path)


def _refuse_unstorable(value: object, path: tuple[str, ...]) -> None:
    match value:
        case str():
            if "\0" in value or not is_unicode(value):
                raise RequestError(
                    "Text must not hold NUL characters or lone surrogates.", param=".".join(path)
                )
        case dict():
            for key, item in value.items():
                _refuse_unstorable(key, path)
                _refuse_unstorable(item, (*path, key))
        case list():
            for index, item in enumerate(value):
                _refuse_unstorable(item, (*path, str(index)))


def is_unicode(text: str) -> bool:
    """Whether a text can be written: it holds no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _url(raw: dict[str, Any], url: str | None) -> Url:
    if url is not None:
        try:
            return Url(url)
        except ValueError:
            known = ", ".join(Url)
            raise UrlNotFound(f"Unknown url. One of: {known}.", param="url") from None
    present = [field for field in _URL_BY_FIELD if field in raw]
    if len(present) != 1:
        problem = "none of them" if not present else " and ".join(present)
        raise RequestError(
            f"Give exactly one of messages, prompt or input; the request has {problem}.",
            param=present[1] if present else "prompt",
        )
    return _URL_BY_FIELD[present[0]]


def first_problem(error: ValidationError, raw: dict[str, Any]) -> RequestError:
    """The first problem as a sentence; unions report once per branch, so the top field decides."""
    problem = error.errors(include_url=False, include_input=False)[0]
    path = _path_in(raw, problem["loc"], is_missing=problem["type"] == "missing")
    if problem["type"] == UNKNOWN_FIELD:
        param = _printable(".".join([*path, problem["ctx"]["name"]]))
        return RequestError(f"Unknown field {param}.", param=param)
    param = _printable(".".join(path) or "body")
    if problem["type"] == "missing":
        return RequestError(f"The field {param} is required.", param=param)
    reason = problem["msg"].removeprefix("Value error, ")
    return RequestError(f"{param}: {reason}.", param=param)


def _printable(name: str) -> str:
    """A field's name as somebody sent it, fit for one line of an error."""
    return json.dumps(name)[1:-1][:200]


def _path_in(value: Any, place: tuple[int | str, ...], *, is_missing: bool) -> list[str]:
    """What of an error's place is in the value: fields and indices, not names of union branches.

    Of one that `is_missing` the last is not there, and named all the same.
    """
    path = []
    for part in place:
        match value:
            case dict() if part in value:
                value = value[part]
            case list() if isinstance(part, int):
                value = value[part]
            case _:
                continue
        path.append(str(part))
    return [*path, str(place[-1])] if is_missing else path


_TOP_FIELDS: Final = frozenset(name for body in BODIES.values() for name in body.model_fields)


def _split(given: Any) -> list[Prompt]:
    """One prompt or several, as a list."""
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [tuple(given)]
    return [item if isinstance(item, str) else tuple(item) for item in given]


def _stops(body: Body) -> list[str]:
    stop = getattr(body, "stop", None)
    return [stop] if isinstance(stop, str) else list(stop or [])
