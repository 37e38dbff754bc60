"""What an answer has to match for a model: a format of its own, calls of tools, thoughts before."""

from __future__ import annotations

from collections.abc import Sequence

from app.engines.sampling.grammar import lark_of
from app.engines.text.tokenizer import Tokenizer
from app.errors import RequestError
from app.jobs import Grammar
from app.requests.calls import literals
from app.requests.chat import ChatBody
from app.requests.reasoning import Marks, State, marks_of
from app.requests.sampled import SampledBody
from app.requests.tool_formats import format_of
from app.requests.tools import Offer


def grammar_for(
    body: SampledBody, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]
) -> Grammar | None:
    """None: it may be anything. `prompts` are in tokens.

    Raises `RequestError` for tools that the model does not know, or calls that it cannot be held
    to.
    """
    answer = body.grammar
    if not isinstance(body, ChatBody):
        return answer
    special = {text: token_id for token_id, text in tokenizer.special.items()}
    calls = _calls(body.offer, tokenizer, special)
    if not body.offer.is_required and answer is None:
        return None
    marks = marks_of(tokenizer.template.source) if tokenizer.template else None
    state: State = marks.state(tokenizer, prompts[0]) if marks else "closed"
    if calls is None and answer is not None and state == "closed":
        return answer
    rules = []
    if answer is not None:
        rules.append(f"answer: {lark_of(answer)}")
    if calls is not None:
        rules.append(f"calls: {calls}")
    begin, thoughts = _thoughts(marks, state, special)
    whole = "answer" if calls is None else "calls" if answer is None else "(answer | calls)"
    return Grammar("lark", "\n".join([f"{begin}{whole}", *rules, *thoughts]))


def _calls(offer: Offer, tokenizer: Tokenizer, special: dict[str, int]) -> str | None:
    if not offer.functions:
        return None
    template = tokenizer.template
    if template is None or not template.takes_tools:
        raise RequestError("This model's chat template has no tools.", param="tools")
    form = format_of(template.source)
    if form is None:
        raise RequestError(
            "How this model writes calls cannot be told from its chat template.", param="tools"
        )
    return form.grammar(offer.functions, many=offer.is_many, special=special)


def _thoughts(marks: Marks | None, state: State, special: dict[str, int]) -> tuple[str, list[str]]:
    """The expression of what may be thought before, and its rules."""
    if marks is None or state == "closed":
        return "", []
    literal = literals(special)
    if marks.end in special:  # a token that no text matches
        thought = f"thought: /(?s:.*)/ {literal(marks.end)}"
    else:
        thought = f"thought[suffix={literal(marks.end)}]: /(?s:.*)/"
    rules = [thought, "breaks: /\\n{0,2}/"]
    if state == "open":
        return "thought breaks ", rules
    return "(thinking breaks)? ", [f"thinking: {literal(marks.begin)} thought", *rules]
