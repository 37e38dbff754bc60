"""What one sequence has produced so far, and whether it is over.

Both text engines append every sampled token to an `Output` and let the row go as soon as `append`
names a reason. Text is made token by token only where stop strings have to be found in it: a
character may be spread over tokens, and a stop string may begin and end inside them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from app.engines.base import SamplingParams
from app.engines.grammar import Matcher
from app.errors import InvalidSchema
from app.jobs import FinishReason

Decode = Callable[[list[int]], str]
"""Text of token ids without special tokens, U+FFFD for what is not (yet) valid UTF-8."""

UNFINISHED: Final = "\ufffd"


class Output:
    """The tokens of one sequence, and their text up to a stop string.

    `token_ids` keeps all that was sampled, with the token that ended it: usage counts them.
    `matcher` follows the output's grammar, if it has one; `error` says why it could not.
    """

    def __init__(
        self, params: SamplingParams, decode: Decode, eos_token_ids: Collection[int]
    ) -> None:
        self.token_ids: list[int] = []
        self.matcher: Matcher | None = None
        self.error: tuple[str, str] | None = None  #: code and message, with FinishReason.ERROR
        self._max_tokens = params.max_tokens
        self._eos = () if params.ignore_eos else eos_token_ids
        self._decode = decode
        self._stop = _StopMatcher(params.stop, decode) if params.stop else None

    def append(self, token_id: int) -> FinishReason | None:
        """Take the next token; the reason if the sequence ends with it. A stop beats the length."""
        self.token_ids.append(token_id)
        if token_id in self._eos or (self._stop and self._stop.push(token_id)):
            return FinishReason.STOP
        if self.matcher is not None:
            try:
                if self.matcher.take(token_id):
                    return FinishReason.STOP
            except InvalidSchema as error:
                self.error = error.code, error.message
                return FinishReason.ERROR
        return FinishReason.LENGTH if len(self.token_ids) >= self._max_tokens else None

    @property
    def text(self) -> str:
        """Everything before the first stop string, or all of it."""
        if self._stop and self._stop.end is not None:
            return self._stop.text[: self._stop.end]
        return self._decode(self.token_ids)


class _StopMatcher:
    """Text token by token, watched for the first place where a stop string begins."""

    def __init__(self, stop: tuple[str, ...], decode: Decode) -> None:
        self.text = ""
        self.end: int | None = None  #: where the stop string begins
        self._stop = stop
        self._longest = max(map(len, stop))
        self._decode = decode
        # A token's text can depend on the one before it, so a window of settled tokens is decoded
        # again with each new one, and what the new one adds is the difference.
        self._window: list[int] = []
        self._settled = 0  #: tokens of the window whose text is in `text`

    def push(self, token_id: int) -> bool:
        """Take the next token; whether a stop string is now complete."""
        self._window.append(token_id)
        before = self._decode(self._window[: self._settled])
        added = self._decode(self._window)[len(before) :]
        whole = added.rstrip(UNFINISHED)
        text = self.text + whole
        searched = max(0, len(self.text) - self._longest + 1)
        found = [place for stop in self._stop if (place := text.find(stop, searched)) >= 0]
        if found:
            self.text, self.end = text, min(found)
            return True
        if whole and whole == added:
            self.text = text
            del self._window[: self._settled]
            self._settled = len(self._window)
        return False
