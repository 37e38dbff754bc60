"""Messages of a chat as OpenAI's API lists those of a stored one. Pure."""

from __future__ import annotations

from typing import Any

from app.requests.chat import ChatBody
from app.requests.conversation import ChatMessage


def stored_messages(asked: ChatBody, completion_id: str) -> list[dict[str, Any]]:
    """What was asked, oldest first. The messages' ids are made of the completion's and their
    place."""
    return [_told(each, f"{completion_id}-{n}") for n, each in enumerate(asked.messages)]


def _told(message: ChatMessage, id: str) -> dict[str, Any]:
    given = message.content if isinstance(message.content, list) else []
    texts = [each.text or "" for each in given if each.type == "text"]
    refusals = [each.refusal or "" for each in given if each.type == "refusal"]
    told: dict[str, Any] = {
        "id": id,
        "role": message.role,
        "content": message.content if isinstance(message.content, str) else _lines(texts),
        "refusal": message.refusal or _lines(refusals),
        "name": message.name,
        "content_parts": [{"type": "text", "text": text} for text in texts] or None,
    }
    more = message.model_dump(
        include={"tool_calls", "tool_call_id", "reasoning_content"}, exclude_none=True
    )
    return told | more


def _lines(texts: list[str]) -> str | None:
    return "\n".join(texts) if texts else None
