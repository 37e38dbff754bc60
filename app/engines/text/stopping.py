"""What one sequence has produced so far, and whether it is over.

The text engines append every sampled token to an `Output` and let the row go as soon as `append`
names a reason. Text is made token by token only where stop strings have to be found in it or where
it is streamed: a character may be spread over tokens, and a stop string may begin and end inside
them.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from app.engines.sampling.grammar import Matcher
from app.engines.text.detokenizer import Detokenizer
from app.engines.text.tokenizer import Tokenizer
from app.errors import InvalidSchema
from app.jobs import FinishReason, SamplingParams


class Output:
    """The tokens of one sequence, and their text up to a stop string.

    `token_ids` keeps all that was sampled, with the token that ended it: usage counts them.
    `matcher` follows the output's grammar, if it has one; `error` says why it could not.

    A special token is no part of the text, but one whose own text a stop string holds is there to
    be found by it.
    """

    def __init__(
        self,
        params: SamplingParams,
        tokenizer: Tokenizer,
        prompt_token_ids: Seq[int],
        *,
        stream: bool = False,
    ) -> None:
        self.token_ids: list[int] = []
        self.matcher: Matcher | None = None
        self.error: tuple[str, str] | None = None  #: code and message, with FinishReason.ERROR
        self._params = params
        self._ends = {*params.stop_token_ids}
        if not params.ignore_eos:
            self._ends |= tokenizer.eos_token_ids
        self._longest = max(map(len, params.stop), default=0)
        self._findable = {
            token_id: text
            for token_id, text in (tokenizer.special.items() if params.stop else ())
            if any(text in stop for stop in params.stop)
        }
        self._is_read = bool(params.stop) or stream
        self._detokenizer = Detokenizer(tokenizer, prompt_token_ids)
        self._unread: list[int] = []  #: tokens of the text that it was not made of yet
        self._read = ""  #: text so far, but for the end of an unfinished character
        self._hidden: list[tuple[int, int]] = []  #: where in it special tokens are
        self._end: int | None = None  #: where in it a stop string begins
        self._taken = 0  #: how much of it was streamed

    def append(self, token_id: int) -> FinishReason | None:
        """Take the next token; the reason if the sequence ends with it. A stop beats the length."""
        self.token_ids.append(token_id)
        may_stop = len(self.token_ids) > self._params.min_tokens
        if may_stop and token_id in self._ends:
            return FinishReason.STOP
        self._unread.append(token_id)
        if self._is_read:
            known = len(self._read)
            self._read_on()
            if may_stop and self._finds_stop(known):
                return FinishReason.STOP
        if self.matcher is not None:
            try:
                if self.matcher.take(token_id):
                    return FinishReason.STOP
            except InvalidSchema as error:
                self.error = error.code, error.message
                return FinishReason.ERROR
        return FinishReason.LENGTH if len(self.token_ids) >= self._params.max_tokens else None

    @property
    def text(self) -> str:
        """Everything before the first stop string, or all of it."""
        self._read_on()
        if self._end is not None:
            return self._shown(0, self._end)
        return self._shown(0, len(self._read)) + self._detokenizer.rest

    def take_text(self) -> str:
        """Text that is new since the last call and certain: in no stop string that may follow."""
        certain = len(self._read) - self._in_doubt()
        taken, self._taken = self._taken, max(self._taken, certain)
        return self._shown(taken, self._taken)

    def take_rest(self) -> str:
        """Once the sequence is over: the text that `take_text` held back."""
        return self.text[len(self._shown(0, self._taken)) :]

    def _read_on(self) -> None:
        read, self._read = self._read, ""  # a text that has one name grows in place
        for token_id in self._unread:
            if token_id in self._findable:
                read += self._detokenizer.break_off()
                begin = len(read)
                read += self._findable[token_id]
                self._hidden.append((begin, len(read)))
            else:
                read += self._detokenizer.read(token_id)
        self._unread.clear()
        self._read = read

    def _finds_stop(self, known: int) -> bool:
        """Whether a stop string has become complete since so many characters were known."""
        places = (self._read.find(it, max(0, known - len(it) + 1)) for it in self._params.stop)
        self._end = min((place for place in places if place >= 0), default=None)
        return self._end is not None

    def _in_doubt(self) -> int:
        """Characters at the end that may turn out to begin a stop string, or do begin one."""
        if self._end is not None:
            return len(self._read) - self._end
        for length in range(min(self._longest - 1, len(self._read)), 0, -1):
            end = self._read[-length:]
            if any(stop.startswith(end) for stop in self._params.stop):
                return length
        return 0

    def _shown(self, begin: int, end: int) -> str:
        """What is text of this stretch."""
        parts = []
        for start, stop in self._hidden:
            parts.append(self._read[begin : min(start, end)])
            begin = max(begin, stop)
        return "".join([*parts, self._read[begin:end]])
