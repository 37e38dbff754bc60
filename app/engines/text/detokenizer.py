"""The text of an output, token by token, as it goes on from its prompt."""

from __future__ import annotations

import codecs
from collections.abc import Sequence as Seq
from typing import Final

from app.engines.text.tokenizer import Tokenizer

_UTF8: Final = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Reads the tokens that follow a prompt. What was read never changes."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Seq[int]) -> None:
        self._tokenizer = tokenizer
        self._before = last_token(tokenizer, prompt_token_ids)
        self._utf8 = _UTF8(errors="replace")

    def read(self, token_id: int) -> str:
        """What is new of the text with this token, but for the end of an unfinished character."""
        piece = self._tokenizer.token_bytes(token_id, self._before)
        if piece:
            self._before = token_id
        return self._utf8.decode(piece)

    def break_off(self) -> str:
        """End here; U+FFFD if that is within a character."""
        return self._utf8.decode(b"", final=True)

    @property
    def rest(self) -> str:
        """What `break_off` would give."""
        pending, _ = self._utf8.getstate()
        return pending.decode(errors="replace")


def last_token(tokenizer: Tokenizer, prompt_token_ids: Seq[int]) -> int | None:
    """The token of a prompt that its output's text follows; None if that begins a text."""
    if tokenizer.separate_output or not prompt_token_ids:
        return None
    texts = (each for each in reversed(prompt_token_ids) if each not in tokenizer.special)
    return next(texts, prompt_token_ids[-1])
