"""The answer to /v1/messages, from a generation. Pure.

https://platform.claude.com/docs/en/api/messages has its shape.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final
from uuid import UUID

from app.engines.base import Generation
from app.engines.text.detokenizer import Detokenizer
from app.engines.text.tokenizer import Tokenizer
from app.ids import name_of
from app.jobs import FinishReason, Usage
from app.requests.answers import Said
from app.requests.message_blocks import CALL_PREFIX
from app.requests.storable import storable

MESSAGE_PREFIX: Final = "msg_"


def message_id(job_id: str) -> str:
    """Of the job's answer."""
    return name_of(MESSAGE_PREFIX, UUID(job_id))


def message_of(
    job_id: str,
    model: str,
    content: list[dict[str, Any]],
    reason: str | None,
    stop_sequence: str | None,
    counted: Usage,
) -> dict[str, Any]:
    """`reason` is its `stop_reason`; None while it is not over."""
    return {
        "id": message_id(job_id),
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": stop_sequence,
        "usage": usage_of(counted),
    }


def content_of(found: Said, call_ids: Sequence[str]) -> list[dict[str, Any]]:
    """Blocks: the thought, what is said, the calls. An answer that says nothing has none."""
    blocks: list[dict[str, Any]] = []
    if found.reasoning:
        thought = storable(found.reasoning)
        blocks.append({"type": "thinking", "thinking": thought, "signature": ""})
    if found.content:
        blocks.append({"type": "text", "text": storable(found.content)})
    for call, call_id in zip(found.calls, call_ids, strict=True):
        blocks.append(
            {
                "type": "tool_use",
                "id": f"{CALL_PREFIX}{call_id}",
                "name": call.name,
                "input": json.loads(call.arguments),
            }
        )
    return blocks


def usage_of(counted: Usage) -> dict[str, Any]:
    """`input_tokens` are those that were not in the prefix cache."""
    return {
        "input_tokens": counted.input_tokens - counted.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counted.cached_tokens,
        "output_tokens": counted.output_tokens,
        "service_tier": "standard",
    }


def stop_reason(
    answer: Generation,
    has_calls: bool,
    stops: Sequence[str],
    tokenizer: Tokenizer,
    prompt: Sequence[int],
) -> tuple[str, str | None]:
    """Why it ended, and the stop sequence that was met. What is cut off otherwise, as by a cancel,
    is told as cut off at its length: the API has no word for it."""
    if answer.finish_reason is not FinishReason.STOP:
        return "max_tokens", None
    if has_calls:
        return "tool_use", None
    met = _met(answer, stops, tokenizer, prompt)
    return ("end_turn", None) if met is None else ("stop_sequence", met)


def _met(
    answer: Generation, stops: Sequence[str], tokenizer: Tokenizer, prompt: Sequence[int]
) -> str | None:
    """The stop sequence that the answer's tokens come to first; its text ends before it."""
    if not stops or not answer.token_ids:
        return None
    findable = {
        token_id: text
        for token_id, text in tokenizer.special.items()
        if any(text in stop for stop in stops)
    }
    detokenizer = Detokenizer(tokenizer, prompt)
    pieces = (
        findable[each] if each in findable else detokenizer.read(each) for each in answer.token_ids
    )
    text = "".join(pieces)
    found = [(place, -len(stop), stop) for stop in stops if (place := text.find(stop)) >= 0]
    return min(found)[2] if found else None
