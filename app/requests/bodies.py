"""What a producer asks: the body of an OpenAI-style call, checked, and what it means to an engine.

A request is `(url, body)`. The url follows from the field present when it is left out:
`messages` → /v1/chat/completions, `prompt` → /v1/completions, `query` → /v1/rerank, `text_1` →
/v1/score, `input` → /v1/translations with a language, /v1/classify or /v1/translations if the model
named does that, and else /v1/embeddings. Field names and meanings are those of the OpenAI API, with
vLLM's names for the calls and the sampling parameters it lacks (top_k, min_p, repetition_penalty,
ignore_eos …) and transformers' for a search's; `app.requests.handling` says what is not obeyed.
/v1/messages is Anthropic's, and has to be named: a chat has the same field; so has /v1/responses,
since embeddings have an `input`, too.

Pure: limits that depend on a model's tokenizer are checked by `app.engines.text.tokenizer`.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

from pydantic import ValidationError

from app.errors import LaterFormat, RequestError, UrlNotFound
from app.jobs import Kind
from app.requests.body import Body
from app.requests.chat import ChatBody
from app.requests.classification import ClassifyBody
from app.requests.completion import CompletionBody
from app.requests.embedding import EmbeddingBody
from app.requests.messages import MessagesBody
from app.requests.part import DROP_UNKNOWN
from app.requests.problems import first_problem
from app.requests.prompts import Prompt
from app.requests.response import ResponsesBody
from app.requests.scoring import RerankBody, ScoreBody
from app.requests.storable import refuse_unstorable
from app.requests.translation import TranslationBody

FORMAT: Final = 1
"""Version of the format of stored requests. Raise it with every field or value that code of before
would refuse: rows of a later format are left to workers that know it."""


def readable(format: int) -> bool:
    """Whether requests of this format can be read here."""
    return format <= FORMAT


class Url(enum.StrEnum):
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"
    CLASSIFY = "/v1/classify"
    RERANK = "/v1/rerank"
    SCORE = "/v1/score"
    TRANSLATIONS = "/v1/translations"
    MESSAGES = "/v1/messages"
    RESPONSES = "/v1/responses"

    @classmethod
    def _missing_(cls, value: object) -> Url | None:
        """Other paths that servers have for the same call."""
        return _ALIASES.get(str(value))

    @property
    def kind(self) -> Kind:
        return BODIES[self].KIND


BODIES: Final[dict[Url, type[Body]]] = {
    Url.CHAT: ChatBody,
    Url.COMPLETIONS: CompletionBody,
    Url.EMBEDDINGS: EmbeddingBody,
    Url.CLASSIFY: ClassifyBody,
    Url.RERANK: RerankBody,
    Url.SCORE: ScoreBody,
    Url.TRANSLATIONS: TranslationBody,
    Url.MESSAGES: MessagesBody,
    Url.RESPONSES: ResponsesBody,
}
_ALIASES: Final = {
    "/classify": Url.CLASSIFY,
    "/rerank": Url.RERANK,
    "/v2/rerank": Url.RERANK,
    "/score": Url.SCORE,
}
_URL_BY_FIELD: Final = {
    "messages": Url.CHAT,
    "prompt": Url.COMPLETIONS,
    "input": Url.EMBEDDINGS,
    "query": Url.RERANK,
    "text_1": Url.SCORE,
}
URL_OF_INPUT: Final[Mapping[Kind | None, Url]] = {
    Kind.CLASSIFY: Url.CLASSIFY,
    Kind.TRANSLATE: Url.TRANSLATIONS,
}
"""Calls that have an `input` as embeddings do, by what else says which of them is meant."""

KindOf = Callable[[str], Kind | None]
"""What a model of this name does; None if there is none."""


def _kind_unknown(model: str) -> None:
    """Where nobody says what models do."""


@dataclass(frozen=True)
class Request:
    """A checked request. `sent` is the body of its call, and `body` what it means to a model. `raw`
    is `sent` in its one form, without nulls, unknown fields and metadata, and with schemas as JSON
    text: what is stored and fingerprinted."""

    url: Url
    sent: Body
    raw: dict[str, Any]

    @cached_property
    def body(self) -> Body:
        return self.sent.meant

    @property
    def adapter(self) -> str:
        """The LoRA adapter that the request names behind its model, if it does."""
        return (self.body.model or "").partition(":")[2]

    @property
    def kind(self) -> Kind:
        return self.url.kind

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of url and body in canonical JSON: equal for equal requests."""
        text = json.dumps([self.url, self.raw], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The distinct prompts, in order; with `n` each is answered n times."""
        return self.body.prompts

    @cached_property
    def num_answers(self) -> int:
        """Answers per prompt."""
        return self.body.num_answers

    @cached_property
    def num_sequences(self) -> int:
        return len(self.prompts) * self.num_answers

    @property
    def max_tokens(self) -> int | None:
        """The output limit the caller asked for, if any."""
        return self.body.most_tokens


def parse(
    raw: object,
    url: str | None = None,
    *,
    unknown_fields: Literal["refuse", "ignore"] = "refuse",
    kind_of: KindOf = _kind_unknown,
) -> Request:
    """Check a body and return the request. A known field that is null counts as left out. `kind_of`
    says what the models do that it may name.

    Raises `RequestError` whose `param` names the first wrong field and whose message never quotes
    the value: it may be a prompt.
    """
    known_url, body = _checked(_object(raw), url, kind_of, unknown_fields)
    kept = body.model_dump(
        mode="json", by_alias=True, exclude_unset=True, exclude_none=True, exclude={"metadata"}
    )
    refuse_unstorable(kept)
    return Request(known_url, body, kept)


def _object(raw: object) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise RequestError("The request body must be a JSON object.", param="body")
    return raw


def _checked(
    raw: dict[str, Any],
    url: str | None,
    kind_of: KindOf,
    unknown_fields: Literal["refuse", "ignore"],
) -> tuple[Url, Body]:
    raw = {name: it for name, it in raw.items() if it is not None or name not in _TOP_FIELDS}
    known_url = _url(raw, url, kind_of)
    context = DROP_UNKNOWN if unknown_fields == "ignore" else None
    try:
        body = BODIES[known_url].model_validate(raw, context=context)
    except ValidationError as error:
        raise first_problem(error, raw) from None
    body.check()
    return known_url, body


def parse_stored(raw: object, url: str | None, format: int) -> Request:
    """The request of a row, whoever wrote it: as it stands there, for that is its one form.

    Raises `LaterFormat` if it is for other workers to read, and `RequestError` if it is wrong.
    """
    if not readable(format):
        raise LaterFormat()
    raw = _object(raw)
    return Request(*_checked(raw, url, _kind_unknown, "refuse"), raw)


def _url(raw: dict[str, Any], url: str | None, kind_of: KindOf) -> Url:
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
            f"Give exactly one of {', '.join(_URL_BY_FIELD)}; the request has {problem}.",
            param=present[1] if present else "prompt",
        )
    [field] = present
    if field == "input":
        model = raw.get("model")
        kind = kind_of(model) if isinstance(model, str) else None
        if raw.keys() & {"source_language", "target_language"}:
            kind = Kind.TRANSLATE
        return URL_OF_INPUT.get(kind, Url.EMBEDDINGS)
    return _URL_BY_FIELD[field]


_TOP_FIELDS: Final = frozenset(name for body in BODIES.values() for name in body.model_fields)
