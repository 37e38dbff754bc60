"""What an assistant says, as its tokens come: what is certain of it at once, the rest at its end.

    start ─▶ thought ─▶ after ─▶ content ─▶ withheld
      └────────────────────────────┘

Text is told as soon as no token that follows can make something else of it: a mark, a stop string
or a call. From where a call may begin all is held back, for a model may write anything there; at
the end the whole answer, as `app.requests.answers` reads it, says what it was. What was told is
the beginning of that, and never taken back. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from app.engines.text.detokenizer import Detokenizer
from app.engines.text.tokenizer import Tokenizer
from app.errors import Restarted
from app.requests.answers import kept_in
from app.requests.chat import ChatBody
from app.requests.reasoning import State, marks_of
from app.requests.storable import storable
from app.requests.tool_formats import format_of


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new."""

    content: str = ""
    reasoning: str = ""


class Told:
    """A text that is told piece by piece, and how far."""

    def __init__(self) -> None:
        self.text = ""
        self._expected = ""  #: what was told before and has not come again

    def again(self) -> None:
        """It comes anew from its beginning, which nobody is to be told twice."""
        self._expected = self.text

    def say(self, new: str) -> str:
        """What of the next piece was not told before. Raises `Restarted` if it is another text."""
        new = storable(new)
        known = min(len(new), len(self._expected))
        if new[:known] != self._expected[:known]:
            raise Restarted()
        self._expected = self._expected[known:]
        self.text += new[known:]
        return new[known:]

    def rest(self, whole: str) -> str:
        """What of the whole was not told. Blanks around what comes before a call are no part of
        it. Raises `Restarted` if another text was told."""
        for told in (self.text, self.text.strip()):
            if whole.startswith(told):
                return whole[len(told) :]
        raise Restarted()


class Saying:
    """One answer of a chat."""

    def __init__(self, body: ChatBody, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        """`prompt` is the one in tokens that the answer goes on from, or its end."""
        template = tokenizer.template
        source = template.source if template is not None else ""
        self._marks = marks_of(source)
        self._form = format_of(source) if body.offer.functions else None
        self._state: State = "closed"
        if self._marks is not None:
            self._state = self._marks.state(tokenizer, prompt)
        self._has_reasoning = body.include_reasoning
        self._text = _Text(kept_in(self._marks, self._form), tokenizer, prompt, body.stops)
        self._content, self._reasoning = Told(), Told()
        self._begin()

    def _begin(self) -> None:
        self._phase = "content" if self._state == "closed" else "start"
        self._buffer = ""  #: text that was not told
        self._newlines: str | None = None
        """At the end of the thought so far: no part of it if it ends there. None: not begun."""
        self._may_be_call = self._form is not None and self._form.openers == ()
        self._may_think = False  #: what is told as content may yet be a thought
        self.thinks_aloud = False  #: a thought without its first mark was told as content

    def again(self) -> None:
        """The answer is begun anew, after its worker was lost. Raises `Restarted` if what was told
        cannot be gone on with."""
        if self.thinks_aloud:
            raise Restarted()
        self._text.again()
        self._content.again()
        self._reasoning.again()
        self._begin()

    def take(self, text: str, token_ids: Iterable[int] = ()) -> Delta:
        """What is certain with new text, as an engine streams it, and the tokens it is made of.
        Raises `Restarted` if something else was told before."""
        self._buffer += self._text.take(text, token_ids)
        reasoning, content = "", ""
        while True:
            before = self._phase
            match before:
                case "start":
                    self._find_thought()
                case "thought":
                    reasoning += self._thought()
                case "after":
                    self._buffer = self._buffer.lstrip("\n")
                    self._phase = "content" if self._buffer else "after"
                case "content":
                    content += self._said()
            if self._phase == before:
                break
        told = self._content.say(content)
        thought = self._reasoning.say(reasoning) if self._has_reasoning else ""
        return Delta(told, thought)

    def rest(self, content: str | None, reasoning: str | None) -> Delta:
        """What of the whole answer was not told. Raises `Restarted` if something else was."""
        if reasoning and (self.thinks_aloud or (self._may_think and self._content.text)):
            # The thought was told as content, its mark among what was held back, or before.
            with suppress(Restarted):
                return Delta(
                    self._content.rest(content or "") if self.thinks_aloud else content or ""
                )
            return Delta()
        thought = self._reasoning.rest(reasoning or "")
        return Delta(self._content.rest(content or ""), thought)

    # ── what is certain ──────────────────────────────────────────────────────────────────────

    def _find_thought(self) -> None:
        assert self._marks is not None
        begin, start = self._marks.begin, self._buffer.lstrip()
        if start.startswith(begin):
            self._buffer = start.removeprefix(begin)
            self._phase = "thought"
        elif not begin.startswith(start):
            self._may_think = self._state == "free"
            self._phase = "content" if self._may_think else "thought"

    def _thought(self) -> str:
        assert self._marks is not None
        thought, mark, rest = self._buffer.partition(self._marks.end)
        if mark:
            self._buffer, self._phase = rest, "after"
        else:
            thought, self._buffer = parted(thought, (self._marks.end,))
        if self._newlines is None:
            thought = thought.lstrip("\n")
            if not thought:
                return ""
        thought = (self._newlines or "") + thought
        certain = thought.rstrip("\n")
        self._newlines = thought[len(certain) :]
        return certain

    def _said(self) -> str:
        if self._may_be_call:
            start = self._buffer.lstrip()
            if any(map(start.startswith, _BARE)):
                self._phase = "withheld"
                return ""
            if any(each.startswith(start) for each in _BARE):
                return ""
            self._may_be_call = False
        openers = self._form.openers if self._form is not None else ()
        ends = (self._marks.end,) if self._marks is not None and self._may_think else ()
        found = [(at, each) for each in (*openers, *ends) if (at := self._buffer.find(each)) >= 0]
        if not found:
            certain, self._buffer = parted(self._buffer, (*openers, *ends))
            return certain
        at, mark = min(found)
        certain, self._buffer = self._buffer[:at], self._buffer[at + len(mark) :]
        self._phase = "withheld"
        if mark in ends:  # what was told is said to be a thought now; the rest is content
            self._phase, self._may_think, self.thinks_aloud = "after", False, True
            self._content = Told()
            return ""
        return certain


_BARE: Final = ("{", "<|python_tag|>")
"""How an answer begins that is a call by itself."""


def parted(text: str, marks: Iterable[str]) -> tuple[str, str]:
    """What is certain of a text, and its end, if one of the marks may begin there."""
    most = max((len(mark) - 1 for mark in marks), default=0)
    for length in range(min(most, len(text)), 0, -1):
        if any(mark.startswith(text[-length:]) for mark in marks):
            return text[:-length], text[-length:]
    return text, ""


class _Text:
    """The text of an answer, with those of its special tokens that are marks.

    An engine's text is without special tokens. From the first of them on the text is made of the
    tokens here, up to where a stop string may begin.
    """

    def __init__(
        self, kept: set[str], tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]
    ) -> None:
        self._kept = {
            token_id: text for token_id, text in tokenizer.special.items() if text in kept
        }
        self._tokenizer, self._prompt, self._stops = tokenizer, prompt, stops
        self.again()

    def again(self) -> None:
        self._detokenizer = Detokenizer(self._tokenizer, self._prompt)
        self._token_ids: list[int] = []  #: until the first mark
        self._length = 0  #: of what was given until then
        self._is_own = False
        self._held = ""  #: the end of the text, which may begin a stop string
        self._is_over = False

    def take(self, text: str, token_ids: Iterable[int]) -> str:
        if not self._kept:
            return text
        if self._is_own:
            return self._made_of(token_ids)
        self._token_ids += token_ids
        if self._kept.keys().isdisjoint(self._token_ids):
            self._length += len(text)
            return text
        self._is_own = True
        return self._made_of(self._token_ids)[self._length :]

    def _made_of(self, token_ids: Iterable[int]) -> str:
        if self._is_over:
            return ""
        pieces = (self._kept.get(each, "") + self._detokenizer.read(each) for each in token_ids)
        text = self._held + "".join(pieces)
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self._is_over = True
            return text[: min(ends)]
        text, self._held = parted(text, self._stops)
        return text
