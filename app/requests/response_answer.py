"""The `response` object of OpenAI's Responses API. Pure.

https://platform.openai.com/docs/api-reference/responses/object has its shape. Of the fields that
may be left out or null there, those are told that strict clients ask for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from app.errors import (
    ContextLengthExceeded,
    InvalidSchema,
    ModelNotFound,
    RequestError,
    UrlNotFound,
)
from app.ids import name_of
from app.jobs import FinishReason, JobState, Usage
from app.requests.answers import Said
from app.requests.response import RESPONSE_PREFIX, ResponsesBody
from app.requests.response_tools import ChoiceObject
from app.requests.storable import storable

_TIERS: Final = {None: "default", "auto": "default", "fast": "priority"}


def response_id(job_id: UUID) -> str:
    return name_of(RESPONSE_PREFIX, job_id)


def response_shell(
    asked: ResponsesBody,
    *,
    job_id: UUID,
    model: str,
    created_at: int,
    metadata: Mapping[str, str],
) -> dict[str, Any]:
    """A response without an answer: what was asked, given back. `created_at` is in UNIX seconds."""
    choice, options = asked.tool_choice, asked.background_options
    text = asked.text and asked.text.format
    return {
        "id": response_id(job_id),
        "object": "response",
        "created_at": created_at,
        "status": "queued",
        "background": asked.background,
        "background_options": options and options.model_dump(exclude_none=True),
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": None,
        "model": model,
        "output": [],
        "parallel_tool_calls": asked.parallel_tool_calls,
        "previous_response_id": asked.previous_response_id,
        "reasoning": {
            "effort": asked.reasoning and asked.reasoning.effort,
            "summary": None,
        },
        "service_tier": _TIERS.get(asked.service_tier, asked.service_tier),
        "store": asked.store,
        "temperature": asked.temperature,
        "text": {"format": text.told if text else {"type": "text"}, "verbosity": "medium"},
        "tool_choice": _told(choice) if isinstance(choice, ChoiceObject) else choice or "auto",
        "tools": [each.told for each in asked.tools],
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": asked.top_p,
        "presence_penalty": asked.presence_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "truncation": asked.truncation or "disabled",
        "usage": None,
        "user": asked.user,
        "safety_identifier": asked.safety_identifier,
        "prompt_cache_key": asked.prompt_cache_key,
        "metadata": dict(metadata),
    }


def answered(
    shell: Mapping[str, Any],
    found: Said,
    call_ids: Sequence[str],
    *,
    reason: FinishReason,
    counted: Usage,
    logprobs: Sequence[Mapping[str, Any]] = (),
    state: JobState = JobState.COMPLETED,
    error_code: str | None = None,
    error_message: str | None = None,
) -> dict[str, Any]:
    """The response once its job has ended; `logprobs` are those of a chat's choice."""
    is_whole = state is JobState.COMPLETED and reason is not FinishReason.LENGTH
    output = output_of(found, call_ids, hex_of(shell), logprobs)
    if output and not is_whole:
        output[-1]["status"] = "incomplete"
    told = ended(shell, state, error_code, error_message) | {
        "output": output,
        "usage": usage_of(counted, found.reasoning_tokens),
    }
    if told["status"] == "completed" and not is_whole:
        told |= {
            "status": "incomplete",
            "incomplete_details": {"reason": "max_output_tokens"},
        }
    return told


def ended(
    shell: Mapping[str, Any],
    state: JobState,
    error_code: str | None = None,
    error_message: str | None = None,
) -> dict[str, Any]:
    """The response of a job that is final, as far as its state tells. One that expired has failed:
    the API has no word for it."""
    match state:
        case JobState.COMPLETED:
            return dict(shell) | {"status": "completed"}
        case JobState.CANCELLED:
            return dict(shell) | {"status": "cancelled"}
    error = {
        "code": "invalid_prompt" if error_code in _PROMPT_CODES else "server_error",
        "message": f"{error_message or 'The job failed.'} ({error_code or state})",
    }
    return dict(shell) | {"status": "failed", "error": error}


_PROMPT_CODES: Final = frozenset(
    each.code
    for each in (RequestError, ContextLengthExceeded, InvalidSchema, ModelNotFound, UrlNotFound)
)
"""What is wrong with the request; all else is the server's, in the API's closed list of codes."""


def output_of(
    found: Said, call_ids: Sequence[str], digits: str, logprobs: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Output items: the thought, what is said, the calls. `digits` are of the response's id."""
    items: list[dict[str, Any]] = []

    def add(prefix: str, kind: str, **fields: Any) -> None:
        id = f"{prefix}_{digits}{len(items):02x}"
        items.append({"id": id, "type": kind, "status": "completed", **fields})

    if found.reasoning is not None:
        thought = {"type": "reasoning_text", "text": storable(found.reasoning)}
        add("rs", "reasoning", summary=[], content=[thought], encrypted_content=None)
    if found.content or (not items and not found.calls):
        part = text_part(storable(found.content), [_logprob(each) for each in logprobs])
        add("msg", "message", role="assistant", content=[part])
    for call, call_id in zip(found.calls, call_ids, strict=True):
        add("fc", "function_call", call_id=call_id, name=call.name, arguments=call.arguments)
    return items


def text_part(text: str, logprobs: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": [*logprobs]}


def usage_of(counted: Usage, reasoning_tokens: int) -> dict[str, Any]:
    return {
        "input_tokens": counted.input_tokens,
        "input_tokens_details": {"cached_tokens": counted.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": counted.output_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
        "total_tokens": counted.total_tokens,
    }


def hex_of(response: Mapping[str, Any]) -> str:
    """The digits of its id."""
    return str(response["id"]).removeprefix(RESPONSE_PREFIX)


def _logprob(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A special token's bytes are those of its name: here they have to be told."""
    told = {"bytes": [*entry["token"].encode()]} if entry["bytes"] is None else {}
    tops = {"top_logprobs": [_logprob(each) for each in entry.get("top_logprobs", ())]}
    return dict(entry) | told | (tops if "top_logprobs" in entry else {})


def _told(choice: ChoiceObject) -> dict[str, Any]:
    return choice.model_dump(mode="json", exclude_none=True)
