"""What an assistant says, as its tokens come: what is certain of it at once, the rest at its end.

    start ─▶ thought ─▶ after ─▶ content ─▶ withheld
      └────────────────────────────┘

Text is told as soon as no token that follows can make something else of it: a mark, a stop
string, a call, or blanks before one. From where a call may begin all is held back, for a model may
write anything there; at the end the whole answer, as `app.requests.answers` reads it, says what it
was. What was told is the beginning of that, and never taken back. Only where a thought's first mark
was left out is it told as content, all of it, before its end mark is seen. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from app.engines.text.tokenizer import Tokenizer
from app.errors import Restarted
from app.requests.answers import kept_in
from app.requests.chat import ChatBody
from app.requests.marked_text import MarkedText, parted
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

    @property
    def length(self) -> int:
        """How far it has come this time."""
        return len(self.text) - len(self._expected)

    def rest(self, whole: str, start: int = 0) -> str:
        """What of the whole was not told from `start` on. Blanks that it begins with are no part of
        it if calls follow. Raises `Restarted` if another text was told."""
        told = self.text[start:]
        for each in (told, told.lstrip()):
            if whole.startswith(each):
                return whole[len(each) :]
        raise Restarted()


class Saying:
    """One answer of a chat."""

    def __init__(self, body: ChatBody, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        """`prompt` is the one in tokens that the answer goes on from, or its end."""
        template = tokenizer.template
        source = template.source if template is not None else ""
        self._marks = marks_of(source)
        self._form = format_of(source) if body.offer.functions else None
        self._is_bare = self._form is not None and self._form.openers == ()
        self._state: State = "closed"
        if self._marks is not None:
            self._state = self._marks.state(tokenizer, prompt)
        self._has_reasoning = body.include_reasoning
        self._text = MarkedText(kept_in(self._marks, self._form), tokenizer, prompt, body.stops)
        self._content, self._reasoning = Told(), Told()
        self._begin()

    def _begin(self) -> None:
        self._phase = "content" if self._state == "closed" else "start"
        self._buffer = ""  #: text that was not told
        self._newlines: str | None = None
        """At the end of the thought so far: no part of it if it ends there. None: not begun."""
        self._may_be_call = self._is_bare
        self._may_think = False  #: what is told as content may yet be a thought
        self._num_aloud = 0  #: characters told as content that are a thought

    @property
    def thinks_aloud(self) -> bool:
        """A thought without its first mark was told as content, before its end mark came."""
        return self._num_aloud > 0

    def again(self) -> None:
        """The answer is begun anew, after its worker was lost."""
        self._text.again()
        self._content.again()
        self._reasoning.again()
        self._begin()

    def take(self, text: str, token_ids: Sequence[int] = ()) -> Delta:
        """What is certain with new text, as an engine streams it, and the tokens it is made of.
        Raises `Restarted` if something else was told before."""
        return self._certain_of(self._text.take(text, token_ids))

    def rest(self, content: str | None, reasoning: str | None) -> Delta:
        """What of the whole answer was not told. Raises `Restarted` if something else was."""
        last = self._certain_of(self._text.rest())
        said = self._content.rest(content or "", self._num_aloud)
        is_told = self.thinks_aloud or not self._has_reasoning
        thought = "" if is_told else self._reasoning.rest(reasoning or "")
        return Delta(last.content + said, last.reasoning + thought)

    # ── what is certain ──────────────────────────────────────────────────────────────────────

    def _certain_of(self, new: str) -> Delta:
        self._buffer += new
        reasoning, content = "", ""
        while True:
            before = self._phase
            match before:
                case "start":
                    self._find_thought()
                case "thought":
                    reasoning += self._reasoning.say(self._thought())
                case "after":
                    self._buffer = self._buffer.lstrip("\n")
                    self._phase = "content" if self._buffer else "after"
                case _ if self._may_think and self._end in self._buffer:
                    content += self._content.say(self._thought_after_all())
                case "content":
                    content += self._content.say(self._said())
            if self._phase == before:
                break
        return Delta(content, reasoning if self._has_reasoning else "")

    @property
    def _end(self) -> str:
        assert self._marks is not None
        return self._marks.end

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
        thought, mark, rest = self._buffer.partition(self._end)
        if mark:
            self._buffer, self._phase = rest, "after"
        else:
            thought, self._buffer = parted(thought, (self._end,))
        if self._newlines is None:
            thought = thought.lstrip("\n")
            if not thought:
                return ""
        thought = (self._newlines or "") + thought
        certain = thought.rstrip("\n")
        self._newlines = thought[len(certain) :]
        return certain

    def _thought_after_all(self) -> str:
        """All so far was a thought whose first mark was left out. If it was begun to be told as
        content, so is the rest of it."""
        self._may_think, self._may_be_call = False, self._is_bare
        if not self._content.text:
            self._state, self._phase = "open", "thought"
            return ""
        thought, _, self._buffer = self._buffer.partition(self._end)
        self._num_aloud = self._content.length + len(thought)
        self._phase = "after"
        return thought

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
        if found := [at for each in openers if (at := self._buffer.find(each)) >= 0]:
            certain, held = self._buffer[: min(found)], self._buffer[min(found) :]
            self._phase = "withheld"
        else:
            marks = (*openers, self._end) if self._may_think else openers
            certain, held = parted(self._buffer, marks)
        blanks = certain[len(certain.rstrip()) :] if openers else ""
        self._buffer = blanks + held
        return certain.removesuffix(blanks)


_BARE: Final = ("{", "<|python_tag|>")
"""How an answer begins that is a call by itself."""
