"""What the calls have in common that give one answer to a text and generate nothing."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from app.engines.checkpoint.card import Card
from app.errors import RequestError
from app.jobs import PoolingParams
from app.requests.body import Body
from app.requests.handling import Whole


class PooledBody(Body):
    truncate_prompt_tokens: Annotated[Whole, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None,
        description="Cut what has more tokens than this, those around the text included; -1 is "
        "the model's limit. Left out, what is too long is refused.",
        examples=[512],
    )

    @property
    def pooling(self) -> PoolingParams:
        """How the answers are given."""
        raise NotImplementedError

    @property
    def most_pair_tokens(self) -> int | None:
        """Tokens to which the second text of each pair is cut, before anything else is."""
        return None

    def prefix(self, card: Card) -> str:
        """What is put before each text."""
        return ""

    def check_model(self, card: Card) -> None:
        """Raises `RequestError` for what this model does not give."""

    def most_prompt_tokens(self, context_tokens: int) -> int | None:
        """Tokens to which each prompt is cut; None is not at all. Raises `RequestError`."""
        asked = self.truncate_prompt_tokens
        if asked is None or 0 < asked <= context_tokens:
            return asked
        if asked == -1:
            return context_tokens
        raise RequestError(
            f"truncate_prompt_tokens is -1 or from 1 to {context_tokens}, the model's context.",
            param="truncate_prompt_tokens",
        )
