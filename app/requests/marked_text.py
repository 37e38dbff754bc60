"""The text of an answer with those of its special tokens that mean something in it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Set
from collections.abc import Sequence as Seq

from app.engines.text.detokenizer import Detokenizer
from app.engines.text.tokenizer import Tokenizer


class MarkedText:
    """Reads an answer as an engine streams it, or all at once.

    An engine's text is without special tokens. From the first mark among them on, the text is made
    of the tokens here, up to a stop string.
    """

    def __init__(
        self, marks: Set[str], tokenizer: Tokenizer, prompt: Seq[int], stops: Seq[str]
    ) -> None:
        """`marks` are texts of special tokens; the answer goes on from `prompt`, or its end."""
        self._marks = {
            token_id: text for token_id, text in tokenizer.special.items() if text in marks
        }
        self._tokenizer, self._prompt, self._stops = tokenizer, prompt, stops
        self.again()

    def again(self) -> None:
        """The answer comes anew from its beginning."""
        self._detokenizer = Detokenizer(self._tokenizer, self._prompt)
        self._token_ids: list[int] = []  #: until the first mark
        self._length = 0  #: of what was given until then
        self._is_own = False
        self._held = ""  #: the end of the text, which may begin a stop string
        self._is_over = False

    def has_mark(self, token_ids: Iterable[int]) -> bool:
        return not self._marks.keys().isdisjoint(token_ids)

    def take(self, text: str, token_ids: Seq[int]) -> str:
        """What is certain with new text and the tokens it is made of."""
        if not self._marks:
            return text
        if self._is_own:
            return self._made_of(token_ids)
        self._token_ids += token_ids
        if not self.has_mark(token_ids):
            self._length += len(text)
            return text
        self._is_own = True
        return self._made_of(self._token_ids)[self._length :]

    def rest(self) -> str:
        """Once the answer is over: what was held back."""
        return self._up_to_stop(self._detokenizer.break_off(), ()) if self._is_own else ""

    def _made_of(self, token_ids: Iterable[int]) -> str:
        read = self._detokenizer.read
        pieces = (self._marks.get(each, "") + read(each) for each in token_ids)
        return self._up_to_stop("".join(pieces), self._stops)

    def _up_to_stop(self, new: str, may_follow: Seq[str]) -> str:
        if self._is_over:
            return ""
        text = self._held + new
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self._is_over = True
            return text[: min(ends)]
        text, self._held = parted(text, may_follow)
        return text


def parted(text: str, marks: Iterable[str]) -> tuple[str, str]:
    """What is certain of a text, and its end, if one of the marks may begin there."""
    most = max((len(mark) - 1 for mark in marks), default=0)
    for length in range(min(most, len(text)), 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks):
            return text[:-length], text[-length:]
    return text, ""
