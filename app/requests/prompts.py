"""Prompts as they stand in a body: text, several texts, or token ids of one or several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import Field, WrapValidator

from app.requests.conversation import Conversation
from app.requests.handling import all_whole

MAX_TOKEN_ID: Final = 2**31 - 1

# Without `fail_fast` two megabytes of wrong items are half a million errors, which take half a
# gigabyte, to tell the first.
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIds = Annotated[
    list[TokenId],
    Field(min_length=1, fail_fast=True),
    WrapValidator(all_whole),
]
Text = Annotated[str, Field(min_length=1)]
Prompts = (
    Text
    | TokenIds
    | Annotated[list[Text], Field(min_length=1, max_length=2048, fail_fast=True)]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=2048, fail_fast=True)]
)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts that a model reads as one prompt."""

    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Source:
    """A text to be translated, and the languages as the model calls them."""

    text: str
    source_language: str | None
    target_language: str | None


Prompt = str | tuple[int, ...] | Conversation | Pair | Source
"""One prompt: text, token ids, a pair of texts, a text to translate, or a conversation still to be
put through the chat template."""


def split(given: Prompts) -> list[Prompt]:
    """One prompt or several, as a list."""
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [tuple(given)]
    return [item if isinstance(item, str) else tuple(item) for item in given]
