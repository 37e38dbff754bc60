"""What a model thinks before it answers, told from the answer by the marks of its chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal

from app.engines.text.tokenizer import Tokenizer

State = Literal["open", "closed", "free"]
"""Whether a prompt ends within a thought, behind one, or leaves it to the model."""

_TAIL: Final = 16
"""Tokens at the end of a prompt in which its last mark is looked for."""


@dataclass(frozen=True, slots=True)
class Marks:
    """What is written before and behind a thought."""

    begin: str
    end: str

    def state(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> State:
        tail = tokenizer.decode(prompt[-_TAIL:], skip_special_tokens=False).rstrip()
        if tail.endswith(self.begin):
            return "open"
        return "closed" if tail.endswith(self.end) else "free"

    def split(self, text: str, state: State) -> tuple[str | None, str]:
        """The thought, if there is one, and the rest. Nothing is lost but the marks and the line
        breaks around them; a thought that was cut off is all of the text."""
        if state == "closed":
            return None, text
        start = text.lstrip()
        if start.startswith(self.begin):
            thought, _, rest = start.removeprefix(self.begin).partition(self.end)
        elif state == "open" or self.end in text:  # some leave out the first mark
            thought, _, rest = text.partition(self.end)
        else:
            return None, text
        return thought.strip("\n"), rest.lstrip("\n")


_PAIRS: Final = (
    Marks("<think>", "</think>"),
    Marks("[THINK]", "[/THINK]"),
    Marks("<seed:think>", "</seed:think>"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),
    Marks("◁think▷", "◁/think▷"),
)


@lru_cache(maxsize=64)
def marks_of(template: str) -> Marks | None:
    """The marks that a chat template's source has, if any."""
    return next((each for each in _PAIRS if each.end in template), None)
