"""What an assistant's answer says, thinks, and asks to be called, by its model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from app.engines.base import Generation
from app.engines.text.detokenizer import Detokenizer
from app.engines.text.tokenizer import Tokenizer
from app.requests.calls import Call
from app.requests.chat import ChatBody
from app.requests.reasoning import marks_of
from app.requests.tool_formats import format_of


@dataclass(frozen=True, slots=True)
class Said:
    content: str
    reasoning: str | None = None
    calls: list[Call] = field(default_factory=list)


def said(body: ChatBody, answer: Generation, tokenizer: Tokenizer, prompt: Sequence[int]) -> Said:
    """`prompt` is the one in tokens that the answer goes on from."""
    template = tokenizer.template
    if template is None:
        return Said(answer.text)
    marks = marks_of(template.source)
    offer = body.offer
    form = format_of(template.source) if offer.functions else None
    kept = {*(form.marks if form else ()), *((marks.begin, marks.end) if marks else ())}
    content = _text_with(kept, answer, tokenizer, prompt, body.stops)
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
    )


def _text_with(
    marks: set[str],
    answer: Generation,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    stops: Sequence[str],
) -> str:
    """The answer's text, with those of its special tokens that are marks."""
    kept = {token_id: text for token_id, text in tokenizer.special.items() if text in marks}
    if kept.keys().isdisjoint(answer.token_ids):
        return answer.text
    detokenizer = Detokenizer(tokenizer, prompt)
    pieces = (kept.get(each, "") + detokenizer.read(each) for each in answer.token_ids)
    text = "".join(pieces) + detokenizer.break_off()
    ends = (place for stop in stops if (place := text.find(stop)) >= 0)
    return text[: min(ends, default=len(text))]
