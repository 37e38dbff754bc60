"""The calls /v1/rerank, as Jina, Cohere and vLLM have it, and /v1/score, as vLLM has it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

from pydantic import Field

from app.errors import RequestError
from app.jobs import Kind, PoolingParams
from app.requests.handling import Whole
from app.requests.part import Part
from app.requests.pooled import PooledBody
from app.requests.prompts import Pair, Prompt, Text

MAX_TEXTS: Final = 2048
MAX_REPEATED: Final = 4_000_000
"""Characters of a text times the pairs it is in: each is turned into tokens anew, and in two
megabytes there could be work for minutes."""


class Document(Part):
    """A document as an object, as some clients send it."""

    text: Text = Field(description="What it says.", examples=["A mill grinds grain."])


class _PairBody(PooledBody):
    KIND: ClassVar = Kind.RERANK

    use_activation: bool = Field(
        True,
        description="Scores as the model means them; false gives its logits.",
        examples=[False],
    )

    @property
    def pooling(self) -> PoolingParams:
        return PoolingParams(use_activation=self.use_activation)


class RerankBody(_PairBody):
    """Body of /v1/rerank."""

    PROMPT_FIELD: ClassVar = "documents"

    query: Text = Field(description="What is looked for.", examples=["What is a grist mill?"])
    documents: Annotated[
        list[Text | Document], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)
    ] = Field(
        description="What is found: texts, or objects with a `text`.",
        examples=[["A mill grinds grain.", "A wheel turns."]],
    )
    top_n: Annotated[Whole, Field(ge=0, le=2**31 - 1)] | None = Field(
        None, description="Give only the best so many; all when left out, or 0.", examples=[1]
    )
    return_documents: bool = Field(
        False, description="Give each document's text with its score.", examples=[True]
    )
    max_tokens_per_doc: Annotated[Whole, Field(ge=1, le=2**31 - 1)] | None = Field(
        None,
        description="Cut each document to so many tokens; then `truncate_prompt_tokens` is -1 if "
        "it is left out.",
        examples=[512],
    )

    @property
    def texts(self) -> list[str]:
        """Of the documents."""
        return [each if isinstance(each, str) else each.text for each in self.documents]

    @property
    def prompts(self) -> list[Prompt]:
        return [Pair(self.query, text) for text in self.texts]

    def check(self) -> None:
        _refuse_repeated(self.query, len(self.documents), "query")

    @property
    def most_pair_tokens(self) -> int | None:
        return self.max_tokens_per_doc

    def most_prompt_tokens(self, context_tokens: int) -> int | None:
        if self.truncate_prompt_tokens is None and self.max_tokens_per_doc is not None:
            return context_tokens
        return super().most_prompt_tokens(context_tokens)


Texts = Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)]


class ScoreBody(_PairBody):
    """Body of /v1/score."""

    PROMPT_FIELD: ClassVar = "text_2"

    text_1: Texts = Field(
        description="A text for all of `text_2`, or as many as these.",
        examples=["What is a grist mill?"],
    )
    text_2: Texts = Field(
        description="A text or several; each is scored with its own of `text_1`.",
        examples=[["A mill grinds grain.", "A wheel turns."]],
    )

    @property
    def prompts(self) -> list[Prompt]:
        first, second = _listed(self.text_1), _listed(self.text_2)
        if len(first) == 1:
            first = first * len(second)
        return [Pair(*pair) for pair in zip(first, second, strict=True)]

    def check(self) -> None:
        first, second = len(_listed(self.text_1)), len(_listed(self.text_2))
        if first not in (1, second):
            raise RequestError(
                f"text_1 has {first} texts and text_2 {second}: give as many, or one text_1.",
                param="text_1",
            )
        if first == 1:
            _refuse_repeated(_listed(self.text_1)[0], second, "text_1")


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def _refuse_repeated(text: str, times: int, field: str) -> None:
    if len(text) * times > MAX_REPEATED:
        raise RequestError(
            f"{field} has {len(text)} characters and is in {times} pairs: that is more than "
            f"{MAX_REPEATED} in all.",
            param=field,
        )
