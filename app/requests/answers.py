"""What an assistant's answer says, thinks, and asks to be called, by its model's chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from app.engines.base import Generation
from app.engines.text.detokenizer import Detokenizer
from app.engines.text.tokenizer import Tokenizer
from app.requests.calls import Call
from app.requests.chat import ChatBody
from app.requests.marked_text import MarkedText
from app.requests.reasoning import Marks, marks_of
from app.requests.tagged_calls import TaggedFormat
from app.requests.tool_formats import ToolFormat, format_of


@dataclass(frozen=True, slots=True)
class Said:
    content: str
    reasoning: str | None = None
    calls: list[Call] = field(default_factory=list)
    reasoning_tokens: int = 0  #: of the answer's tokens, with the marks around the thought


def said(body: ChatBody, answer: Generation, tokenizer: Tokenizer, prompt: Sequence[int]) -> Said:
    """`prompt` is the one in tokens that the answer goes on from."""
    template = tokenizer.template
    if template is None:
        return Said(answer.text)
    marks = marks_of(template.source)
    offer = body.offer
    form = format_of(template.source) if offer.functions else None
    kept = kept_in(marks, form)
    content, text = answer.text, MarkedText(kept, tokenizer, prompt, body.stops)
    if text.has_mark(answer.token_ids):
        content = text.take("", answer.token_ids) + text.rest()
    reasoning = None
    if marks is not None:
        reasoning, content = marks.split(content, marks.state(tokenizer, prompt))
    calls: list[Call] = []
    if form is not None:
        content, calls = form.read(content, offer.functions)
    return Said(
        content,
        reasoning if body.include_reasoning else None,
        calls if offer.is_many else calls[:1],
        _until(marks.end, kept, answer, tokenizer, prompt) if marks and reasoning else 0,
    )


def kept_in(marks: Marks | None, form: ToolFormat | TaggedFormat | None) -> set[str]:
    """Texts that mean something in an answer, and may be special tokens of a model."""
    return {*(form.marks if form else ()), *((marks.begin, marks.end) if marks else ())}


def _until(
    end: str, marks: set[str], answer: Generation, tokenizer: Tokenizer, prompt: Sequence[int]
) -> int:
    """How many of the answer's tokens come to the end of its thought; all if it has none."""
    text = ""
    for number, piece in enumerate(
        _pieces(marks, answer, tokenizer, Detokenizer(tokenizer, prompt))
    ):
        text = text[-len(end) :] + piece
        if end in text:
            return number + 1
    return len(answer.token_ids)


def _pieces(
    marks: set[str], answer: Generation, tokenizer: Tokenizer, detokenizer: Detokenizer
) -> Iterator[str]:
    """What each of the answer's tokens adds to its text, special ones that are marks too."""
    kept = {token_id: text for token_id, text in tokenizer.special.items() if text in marks}
    for each in answer.token_ids:
        yield kept.get(each, "") + detokenizer.read(each)
