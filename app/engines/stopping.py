"""What one sequence has produced so far, and whether it is over.

The text engines append every sampled token to an `Output` and let the row go as soon as `append`
names a reason. Text is made token by token only where stop strings have to be found in it or where
it is streamed: a character may be spread over tokens, and a stop string may begin and end inside
them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from app.engines.grammar import Matcher
from app.errors import InvalidSchema
from app.jobs import FinishReason, SamplingParams

Decode = Callable[[list[int]], str]
"""Text of token ids without special tokens, U+FFFD for what is not (yet) valid UTF-8."""

UNFINISHED: Final = "\ufffd"


class Output:
    """The tokens of one sequence, and their text up to a stop string.

    `token_ids` keeps all that was sampled, with the token that ended it: usage counts them.
    `matcher` follows the output's grammar, if it has one; `error` says why it could not.
    """

    def __init__(
        self,
        params: SamplingParams,
        decode: Decode,
        eos_token_ids: Collection[int],
        *,
        stream: bool = False,
    ) -> None:
        self.token_ids: list[int] = []
        self.matcher: Matcher | None = None
        self.error: tuple[str, str] | None = None  #: code and message, with FinishReason.ERROR
        self._max_tokens = params.max_tokens
        self._eos = () if params.ignore_eos else eos_token_ids
        self._decode = decode
        self._stop = params.stop
        self._longest = max(map(len, params.stop), default=0)
        self._reader = _Reader(decode) if params.stop or stream else None
        self._read = ""  #: text so far, but for the end of an unfinished character
        self._end: int | None = None  #: where in it a stop string begins
        self._taken = 0  #: how much of it was streamed

    def append(self, token_id: int) -> FinishReason | None:
        """Take the next token; the reason if the sequence ends with it. A stop beats the length."""
        self.token_ids.append(token_id)
        if token_id in self._eos or (self._reader and self._finds_stop(self._reader, token_id)):
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
        return self._decode(self.token_ids) if self._end is None else self._read[: self._end]

    def take_text(self) -> str:
        """Text that is new since the last call and certain: in no stop string that may follow."""
        certain = len(self._read) - self._in_doubt()
        taken, self._taken = self._taken, max(self._taken, certain)
        return self._read[taken : self._taken]

    def take_rest(self) -> str:
        """Once the sequence is over: the text that `take_text` held back."""
        return self.text[self._taken :]

    def _finds_stop(self, reader: _Reader, token_id: int) -> bool:
        """Read on; whether a stop string is now complete."""
        begin = max(0, len(reader.settled) - self._longest + 1)
        self._read = reader.push(token_id)
        found = [place for stop in self._stop if (place := self._read.find(stop, begin)) >= 0]
        self._end = min(found, default=None)
        return bool(found)

    def _in_doubt(self) -> int:
        """Characters at the end that may turn out to begin a stop string, or do begin one."""
        if self._end is not None:
            return len(self._read) - self._end
        for length in range(min(self._longest - 1, len(self._read)), 0, -1):
            end = self._read[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0


class _Reader:
    """Text, token by token."""

    def __init__(self, decode: Decode) -> None:
        self.settled = ""
        self._decode = decode
        # A token's text can depend on the one before it, so a window of settled tokens is decoded
        # again with each new one, and what the new one adds is the difference.
        self._window: list[int] = []
        self._num_settled = 0  #: tokens of the window whose text is settled

    def push(self, token_id: int) -> str:
        """Take the next token; the text so far, but for the end of an unfinished character."""
        self._window.append(token_id)
        before = self._decode(self._window[: self._num_settled])
        added = self._decode(self._window)[len(before) :]
        whole = added.rstrip(UNFINISHED)
        text = self.settled + whole
        if whole and whole == added:
            self.settled = text
            del self._window[: self._num_settled]
            self._num_settled = len(self._window)
        return text
