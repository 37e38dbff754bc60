"""A request in tokens: every limit of a model that is counted in them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

from app.config.settings import ModelSettings
from app.engines.tokenizer import Tokenizer
from app.errors import ContextLengthExceeded, RequestError
from app.jobs import Kind
from app.requests.bodies import ChatBody, ChatMessage, Prompt, Request, Url

PROMPT_FIELDS: Final = {
    Url.CHAT: "messages",
    Url.COMPLETIONS: "prompt",
    Url.EMBEDDINGS: "input",
}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request in tokens, within the model's limits."""

    prompts: tuple[tuple[int, ...], ...]  #: of the distinct prompts; each is answered n times
    max_tokens: int  #: of each answer; 0 for embeddings

    @property
    def num_input_tokens(self) -> int:
        return sum(map(len, self.prompts))


def prepare(request: Request, tokenizer: Tokenizer, settings: ModelSettings) -> Prepared:
    """The request in tokens, or the reason why the model cannot take it.

    Raises `ContextLengthExceeded` or another `RequestError` whose `param` names the field.
    """
    field = PROMPT_FIELDS[request.url]
    if request.num_sequences > settings.max_batch_size:
        raise RequestError(
            f"The request asks for {request.num_sequences} sequences (prompts times n); this "
            f"model takes at most {settings.max_batch_size}.",
            param="n" if request.num_answers > 1 else field,
        )
    prompts = encode(request, tokenizer)
    if request.kind is Kind.EMBED:
        least = wanted = 0
    else:
        least = request.max_tokens or 1
        wanted = request.max_tokens or settings.default_max_tokens
    if least > settings.max_output_tokens:
        raise RequestError(
            f"This model gives at most {settings.max_output_tokens} tokens.",
            param=_max_tokens_field(request),
        )
    longest = max(map(len, prompts))
    room = tokenizer.context_tokens - (0 if tokenizer.separate_output else longest)
    if longest > tokenizer.context_tokens or least > room:
        raise ContextLengthExceeded(
            f"The prompt has {longest} tokens and the answer may have {least}; this model's "
            f"context is {tokenizer.context_tokens} tokens.",
            param=field,
        )
    share = settings.max_batch_tokens // request.num_sequences - longest
    if least > share:
        raise RequestError(
            f"{request.num_sequences} sequences of up to {longest + least} tokens pass this "
            f"model's limit of {settings.max_batch_tokens} tokens at once.",
            param=field,
        )
    return Prepared(prompts, min(wanted, room, share, settings.max_output_tokens))


def encode(request: Request, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token ids of each distinct prompt of a request."""
    field = PROMPT_FIELDS[request.url]
    prompts = request.prompts
    fields = [f"{field}.{place}" for place in range(len(prompts))]
    return tuple(map(partial(_encode, tokenizer), prompts, fields if len(prompts) > 1 else [field]))


def _encode(tokenizer: Tokenizer, prompt: Prompt, field: str) -> tuple[int, ...]:
    if isinstance(prompt, str):
        tokens = tokenizer.encode_text(prompt)
    elif isinstance(prompt[0], ChatMessage):
        tokens = tokenizer.encode_chat(
            [{"role": each.role, "content": each.content} for each in prompt]
        )
    else:
        tokens = prompt
        if max(tokens) >= tokenizer.vocab_size:
            raise RequestError(
                f"A token id is out of range; this model's run to {tokenizer.vocab_size - 1}.",
                param=field,
            )
    if not tokens:
        raise RequestError("The prompt has no tokens.", param=field)
    return tokens


def _max_tokens_field(request: Request) -> str:
    newer = isinstance(request.body, ChatBody) and request.body.max_completion_tokens
    return "max_completion_tokens" if newer else "max_tokens"
