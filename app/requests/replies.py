"""From generations to the body of an OpenAI-style answer. Pure.

Shapes follow the OpenAI API: chat.completion and text_completion, which a translation is like; of
what generates nothing they are in `app.requests.pooled_answers`, a response's is in
`app.requests.response_answer`, and that of Anthropic's API in `app.requests.message_answer`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

from app.engines.base import Generation
from app.engines.text.tokenizer import Tokenizer
from app.jobs import FinishReason, JobState, Usage, job_id_of
from app.requests import logprobs
from app.requests.answers import Said, said
from app.requests.bodies import Request
from app.requests.chat import ChatBody
from app.requests.completion import CompletionBody
from app.requests.logprobs import Spelling
from app.requests.message_answer import content_of, message_of, stop_reason
from app.requests.messages import MessagesBody
from app.requests.pooled import PooledBody
from app.requests.pooled_answers import pooled_answer
from app.requests.response import ResponsesBody
from app.requests.response_answer import answered, response_shell
from app.requests.sampled import SampledBody
from app.requests.storable import storable
from app.requests.translation import TranslationBody

_FINISH_REASON: Final = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "cancelled",
    FinishReason.ERROR: "error",
}


def usage(request: Request, generations: Sequence[Generation]) -> Usage:
    """Tokens of the whole job; a prompt that is answered n times is counted once."""
    num_input = num_cached = num_output = 0
    for each in generations[:: request.num_answers]:
        num_input += each.input_tokens
        # A part of the input, whatever a server elsewhere says.
        num_cached += min(each.cached_tokens, each.input_tokens)
    if not isinstance(request.body, SampledBody) or request.body.has_answer:
        for each in generations:
            num_output += each.output_tokens
    return Usage(input_tokens=num_input, output_tokens=num_output, cached_tokens=num_cached)


def body(
    request: Request,
    generations: Sequence[Generation],
    *,
    job_id: str,
    model: str,
    created: int,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    labels: Sequence[str] = (),
    state: JobState = JobState.COMPLETED,
    error_code: str | None = None,
    error_message: str | None = None,
) -> dict[str, Any]:
    """The response body. `generations` are in the order of the request's sequences, `prompts` are
    the distinct ones in tokens; `created` is in UNIX seconds; `labels` are a classifier's; what is
    told of the end is for calls whose answers have a place for it."""
    counted = usage(request, generations)
    if isinstance(request.body, PooledBody):
        return pooled_answer(
            request.body,
            generations,
            counted,
            job_id=job_id,
            model=model,
            created=created,
            labels=labels,
        )
    answers = [
        (each, Spelling(tokenizer, prompts[i // request.num_answers]))
        for i, each in enumerate(generations)
    ]
    match request.sent, request.body:
        case MessagesBody(), ChatBody() as chat:
            return _message(chat, *answers[0], counted, job_id, model)
        case ResponsesBody() as asked, ChatBody() as chat:
            shell = response_shell(
                asked,
                job_id=job_id_of(job_id),
                model=model,
                created_at=created,
                metadata=asked.metadata,
            )
            ended = (state, error_code, error_message)
            return _response(shell, chat, *answers[0], counted, job_id, ended)
        case _, ChatBody() as chat:
            prefix, name = "chatcmpl", "chat.completion"
            choices = [_chat(i, chat, *each, job_id) for i, each in enumerate(answers)]
        case _, CompletionBody() as completion:
            prefix, name = "cmpl", "text_completion"
            choices = [_completion(i, completion, *each) for i, each in enumerate(answers)]
        case _, TranslationBody():
            prefix, name = "trans", "translation"
            choices = [_translation(i, each) for i, each in enumerate(generations)]
        case _:
            raise NotImplementedError(request.url)
    return {
        "id": f"{prefix}-{job_id}",
        "object": name,
        "created": created,
        "model": model,
        "choices": choices,
        "usage": _usage(counted),
    }


def _message(
    chat: ChatBody,
    answer: Generation,
    spelling: Spelling,
    counted: Usage,
    job_id: str,
    model: str,
) -> dict[str, Any]:
    found = said(chat, answer, spelling.tokenizer, spelling.prompt_token_ids)
    reason, met = stop_reason(
        answer,
        bool(found.calls),
        chat.stops,
        spelling.tokenizer,
        spelling.prompt_token_ids,
    )
    content = content_of(found, _call_ids(found, job_id, 0))
    return message_of(job_id, model, content, reason, met, counted)


def _response(
    shell: dict[str, Any],
    chat: ChatBody,
    answer: Generation,
    spelling: Spelling,
    counted: Usage,
    job_id: str,
    ended: tuple[JobState, str | None, str | None],
) -> dict[str, Any]:
    found = said(chat, answer, spelling.tokenizer, spelling.prompt_token_ids)
    scored = answer.logprobs
    state, error_code, error_message = ended
    return answered(
        shell,
        found,
        _call_ids(found, job_id, 0),
        reason=answer.finish_reason,
        counted=counted,
        logprobs=() if scored is None else logprobs.of_chat(scored, spelling)["content"],
        state=state,
        error_code=error_code,
        error_message=error_message,
    )


def _usage(counted: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": counted.input_tokens,
        "completion_tokens": counted.output_tokens,
        "total_tokens": counted.total_tokens,
        "prompt_tokens_details": {"cached_tokens": counted.cached_tokens},
    }


def _chat(
    index: int, chat: ChatBody, answer: Generation, spelling: Spelling, job_id: str
) -> dict[str, Any]:
    found = said(chat, answer, spelling.tokenizer, spelling.prompt_token_ids)
    scored = answer.logprobs
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    if found.content or not (found.reasoning or found.calls):
        message["content"] = storable(found.content)
    if found.reasoning is not None:
        message["reasoning_content"] = storable(found.reasoning)
    if found.calls:
        message["tool_calls"] = [
            {
                "id": call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call, call_id in zip(found.calls, _call_ids(found, job_id, index), strict=True)
        ]
    reason = _FINISH_REASON[answer.finish_reason]
    return {
        "index": index,
        "message": message,
        "logprobs": None if scored is None else logprobs.of_chat(scored, spelling),
        "finish_reason": "tool_calls" if found.calls and reason == "stop" else reason,
    }


def _call_ids(found: Said, job_id: str, choice: int) -> list[str]:
    """The same whenever the job runs. Nine letters and digits: some templates take no others."""
    names = (f"{job_id} {choice} {place}" for place in range(len(found.calls)))
    return [hashlib.sha256(name.encode()).hexdigest()[:9] for name in names]


def _completion(
    index: int, asked: CompletionBody, answer: Generation, spelling: Spelling
) -> dict[str, Any]:
    text, scored, reason = answer.text, answer.logprobs, answer.finish_reason
    if not asked.has_answer:
        text, scored = "", scored and []
        reason = FinishReason.LENGTH if reason is FinishReason.STOP else reason
    told = None if scored is None else logprobs.of_completion(scored, spelling, text)
    if asked.echo:
        given = asked.prompts[index // asked.n]
        prompt = given if isinstance(given, str) else spelling.prompt_text
        text = prompt + text
        if told is not None:
            told = logprobs.behind(answer.prompt_logprobs or [], spelling, prompt, told)
    return {
        "index": index,
        "text": storable(text),
        "logprobs": told,
        "finish_reason": _FINISH_REASON[reason],
    }


def _translation(index: int, answer: Generation) -> dict[str, Any]:
    return {
        "index": index,
        "text": storable(answer.text),
        "finish_reason": _FINISH_REASON[answer.finish_reason],
    }
