"""From generations to the body of an OpenAI-style answer. Pure.

Shapes follow the OpenAI API: chat.completion, text_completion and a list of embeddings.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Final

from app.engines.base import Generation, TokenLogprob
from app.jobs import FinishReason, Usage
from app.requests.bodies import Request
from app.requests.chat import ChatBody
from app.requests.completion import CompletionBody
from app.requests.embedding import EmbeddingBody

TokenText = Callable[[int], str]
"""The text of one token id."""

_FINISH_REASON: Final = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "cancelled",
    FinishReason.ERROR: "error",
}


def usage(request: Request, generations: Sequence[Generation]) -> Usage:
    """Tokens of the whole job; a prompt that is answered n times is counted once."""
    answers = request.num_answers
    return Usage(
        input_tokens=sum(each.input_tokens for each in generations[::answers]),
        output_tokens=sum(len(each.token_ids) for each in generations),
    )


def body(
    request: Request,
    generations: Sequence[Generation],
    *,
    job_id: str,
    model: str,
    created: int,
    token_text: TokenText,
) -> dict[str, Any]:
    """The response body. `generations` are in the order of the request's sequences; `created` is
    in UNIX seconds."""
    counted = usage(request, generations)
    match request.body:
        case ChatBody():
            return {
                "id": f"chatcmpl-{job_id}",
                "object": "chat.completion",
                "created": created,
                "model": model,
                "choices": [_chat(i, each, token_text) for i, each in enumerate(generations)],
                "usage": _usage(counted),
            }
        case CompletionBody():
            return {
                "id": f"cmpl-{job_id}",
                "object": "text_completion",
                "created": created,
                "model": model,
                "choices": [_completion(i, each, token_text) for i, each in enumerate(generations)],
                "usage": _usage(counted),
            }
        case EmbeddingBody(encoding_format=encoding):
            return {
                "object": "list",
                "model": model,
                "data": [
                    {"object": "embedding", "index": i, "embedding": _vector(each, encoding)}
                    for i, each in enumerate(generations)
                ],
                "usage": {
                    "prompt_tokens": counted.input_tokens,
                    "total_tokens": counted.total_tokens,
                },
            }
        case _:
            raise NotImplementedError(request.url)


def _usage(counted: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": counted.input_tokens,
        "completion_tokens": counted.output_tokens,
        "total_tokens": counted.total_tokens,
    }


def _chat(index: int, answer: Generation, token_text: TokenText) -> dict[str, Any]:
    content = [_chat_logprob(each, token_text) for each in answer.logprobs or ()]
    return {
        "index": index,
        "message": {"role": "assistant", "content": _storable(answer.text), "refusal": None},
        "logprobs": None if answer.logprobs is None else {"content": content, "refusal": None},
        "finish_reason": _FINISH_REASON[answer.finish_reason],
    }


def _chat_logprob(each: TokenLogprob, token_text: TokenText) -> dict[str, Any]:
    return {
        **_named(each.token_id, each.logprob, token_text),
        "top_logprobs": [_named(token, logprob, token_text) for token, logprob in each.top],
    }


def _named(token_id: int, logprob: float, token_text: TokenText) -> dict[str, Any]:
    text = token_text(token_id)
    return {"token": _storable(text), "bytes": list(text.encode()), "logprob": logprob}


def _completion(index: int, answer: Generation, token_text: TokenText) -> dict[str, Any]:
    return {
        "index": index,
        "text": _storable(answer.text),
        "logprobs": _completion_logprobs(answer, token_text),
        "finish_reason": _FINISH_REASON[answer.finish_reason],
    }


def _completion_logprobs(answer: Generation, token_text: TokenText) -> dict[str, Any] | None:
    if answer.logprobs is None:
        return None
    tokens = [_storable(token_text(each.token_id)) for each in answer.logprobs]
    offsets = list(accumulate(map(len, tokens), initial=0))[:-1]
    return {
        "tokens": tokens,
        "token_logprobs": [each.logprob for each in answer.logprobs],
        "top_logprobs": [
            {_storable(token_text(token)): logprob for token, logprob in each.top}
            for each in answer.logprobs
        ],
        "text_offset": offsets,
    }


def _vector(answer: Generation, encoding: str) -> list[float] | str:
    vector = answer.embedding or []
    if encoding == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _storable(text: str) -> str:
    """Postgres takes no NUL characters in JSON; a model may well produce one."""
    return text.replace("\0", "\ufffd")
