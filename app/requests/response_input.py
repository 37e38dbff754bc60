"""Input items as OpenAI's Responses API lists them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

from app.requests.response import ResponsesBody
from app.requests.response_answer import text_part
from app.requests.response_items import (
    CallItem,
    Item,
    MessageItem,
    OutputItem,
    ReasoningItem,
    TextPart,
)

_PREFIXES: Final = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
}


def input_items(asked: ResponsesBody, digits: str) -> list[dict[str, Any]]:
    """What was asked, oldest first, the conversation before included. `digits` are of the
    response's id; the items' own ids are made of them and their place."""
    items = [*(asked.history or ()), *asked.items]
    return [_told(each, f"{digits}i{place:x}") for place, each in enumerate(items)]


def page_of(
    items: Sequence[dict[str, Any]], order: Literal["asc", "desc"], after: str | None, limit: int
) -> dict[str, Any]:
    """A page of a list. Raises `ValueError` if there is no item `after`."""
    ordered = list(items) if order == "asc" else [*reversed(items)]
    start = 0 if after is None else [each["id"] for each in ordered].index(after) + 1
    page = ordered[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + limit < len(ordered),
    }


def _told(item: Item, place: str) -> dict[str, Any]:
    told = {"id": f"{_PREFIXES[item.type]}_{place}", "type": item.type, "status": "completed"}
    match item:
        case MessageItem():
            kind = "output_text" if item.role == "assistant" else "input_text"
            return told | {"role": item.role, "content": _parts(item.content, kind)}
        case CallItem():
            return told | {
                "call_id": item.call_id,
                "name": item.name,
                "arguments": item.arguments,
            }
        case OutputItem():
            output = item.output
            is_text = isinstance(output, str)
            return told | {
                "call_id": item.call_id,
                "output": output if is_text else _parts(output, "input_text"),
            }
        case ReasoningItem():
            return told | {
                "summary": [each.model_dump() for each in item.summary],
                "content": [each.model_dump() for each in item.content],
                "encrypted_content": None,
            }


def _parts(content: str | list[TextPart], kind: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [_part(kind, content)]
    return [
        {"type": "refusal", "refusal": each.refusal}
        if each.type == "refusal"
        else _part(kind, each.text or "")
        for each in content
    ]


def _part(kind: str, text: str) -> dict[str, Any]:
    return text_part(text) if kind == "output_text" else {"type": kind, "text": text}
