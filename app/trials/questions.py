"""What models are tried with: requests as services send them, without what is left to chance."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Final

from app.demo.prompts import prompts
from app.engines.catalog import CatalogModel
from app.engines.text.tokenizer import Tokenizer
from app.errors import RequestError
from app.jobs import WHOLE, Kind, PoolingParams, SamplingParams
from app.requests.bodies import Request, parse
from app.requests.prepare import prepare
from app.requests.sampled import SampledBody

_ROOM: Final = {"max_batch_size": 4096, "max_batch_tokens": 2**40}
"""The prompts of a request are tried as those of several: it may have any number."""


@dataclass(frozen=True, slots=True)
class Question:
    """A text, or the body of a call."""

    where: str  #: for errors, as in "line 3"
    given: str | dict[str, Any]
    url: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt as a model gets it."""

    request: int  #: the place of its question
    tokens: tuple[int, ...]
    params: SamplingParams | None = None  #: greedy; None where no text is written
    type_ids: tuple[int, ...] = ()
    pooling: PoolingParams = WHOLE


def built_in(kind: Kind) -> list[Question]:
    """Real prompts of many lengths, always the same."""
    bodies = prompts()
    texts = [body["input"] for body in bodies if "input" in body]
    match kind:
        case Kind.GENERATE:
            found: list[Any] = [_untold(body) for body in bodies if "input" not in body]
        case Kind.RERANK:
            short = sorted(texts, key=len)[:8]
            found = [{"query": text, "documents": short} for text in short[:4]]
        case _:
            found = texts
    return [Question(f"built-in prompt {place}", each) for place, each in enumerate(found, 1)]


def _untold(body: dict[str, Any]) -> str | dict[str, Any]:
    """A chat as its text alone: for a model without a template it is one to go on with."""
    return str(body["messages"][0]["content"]) if "messages" in body else body


def ask(questions: Seq[Question], model: CatalogModel, num_tokens: int) -> list[Asked]:
    """The prompts of these questions in the model's tokens.

    Of a request its prompts count and its limits; answers are greedy and one to a prompt. An answer
    has `num_tokens` at most where a request does not say. Raises `RequestError` that names the
    question for what the model does not take.
    """
    asked: list[Asked] = []
    for place, question in enumerate(questions):
        try:
            asked += _asked(place, question, model, num_tokens)
        except RequestError as error:
            field = f" ({error.param})" if error.param else ""
            raise RequestError(f"{question.where}{field}: {error}", param=error.param) from None
    return asked


def _asked(place: int, question: Question, model: CatalogModel, num_tokens: int) -> list[Asked]:
    kind = model.settings.kind
    request = parse(_body(question, model.tokenizer, kind), _url(question, kind))
    if request.kind is not kind:
        raise RequestError(f"This is a request to {request.url}; the model's kind is {kind}.")
    settings = model.settings.model_copy(update=_ROOM | {"default_max_tokens": num_tokens})
    prepared = prepare(_plain(request), model.tokenizer, settings, model.card)
    params = prepared.params and greedy(prepared.params)
    types = prepared.type_ids or ((),) * len(prepared.prompts)
    return [
        Asked(place, tokens, params, type_ids, prepared.pooling)
        for tokens, type_ids in zip(prepared.prompts, types, strict=True)
    ]


def _body(question: Question, tokenizer: Tokenizer, kind: Kind) -> object:
    text = question.given
    if not isinstance(text, str):
        return {name: value for name, value in text.items() if name != "model"}
    if kind is Kind.RERANK:
        raise RequestError("A reranker needs a query and documents: give them as JSON.")
    if kind is not Kind.GENERATE:
        return {"input": text}
    if tokenizer.template is None:
        return {"prompt": text}
    return {"messages": [{"role": "user", "content": text}]}


def _url(question: Question, kind: Kind) -> str | None:
    """`input` is what several calls have: without a url it is meant for the model at hand."""
    has_input = isinstance(question.given, str) or "input" in question.given
    urls = {Kind.CLASSIFY: "/v1/classify", Kind.TRANSLATE: "/v1/translations"}
    return question.url or (urls.get(kind) if has_input else None)


def _plain(request: Request) -> Request:
    """The request with one greedy answer."""
    body = request.body
    if not isinstance(body, SampledBody):
        return request
    kept = {
        name: value
        for name, value in request.raw.items()
        if name not in SampledBody.model_fields or name == "parse_special"
    }
    for name in ("max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "echo"):
        kept.pop(name, None)
    length = {} if body.most_tokens is None else {"max_tokens": body.most_tokens}
    return parse(kept | length | {"temperature": 0.0}, request.url)


def greedy(params: SamplingParams) -> SamplingParams:
    """The likeliest answer by the model's own rules: no search, no grammar, no stop strings."""
    return SamplingParams(
        params.max_tokens,
        temperature=0.0,
        num_beams=1,
        unset=frozenset({"repetition_penalty"}),
        decoder_start_token_id=params.decoder_start_token_id,
        forced_bos_token_id=params.forced_bos_token_id,
    )
