"""A sequence as the body of a request to an upstream. Pure."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Final

from app.engines.base import Sequence
from app.engines.openai.options import Options
from app.engines.openai.tokenizer import unpacked
from app.errors import RequestError
from app.jobs import WHOLE, Grammar, SamplingParams

_OURS: Final = {
    name: name
    for name in (
        *("top_k", "min_p", "repetition_penalty"),
        *("min_tokens", "stop_token_ids", "ignore_eos"),
    )
}
NAMES: Final[dict[str, dict[str, str]]] = {
    "openai": {},
    "vllm": _OURS,
    "sglang": _OURS,
    "llamacpp": {
        "top_k": "top_k",
        "min_p": "min_p",
        "repetition_penalty": "repeat_penalty",
        "ignore_eos": "ignore_eos",
    },
}
"""What the servers call the parameters that OpenAI lacks."""

_BY_TOKEN: Final = ("logit_bias", "bad_words", "stop_token_ids", "logprobs")
"""Parameters in token ids, which mean nothing where the upstream's tokenizer is not here."""

_ELSEWHERE: Final = {"max_tokens", "temperature", "top_p", "unset", "grammar"}

_PLAIN: Final = SamplingParams(max_tokens=1)


def request_of(
    sequence: Sequence, options: Options, *, as_text: bool
) -> tuple[str, dict[str, Any]]:
    """The path behind /v1 and the body.

    Raises `RequestError` for what the upstream's protocol has no word for: nothing is dropped.
    """
    prompt: Any = unpacked(sequence.prompt_token_ids) if as_text else [*sequence.prompt_token_ids]
    if sequence.params is None:
        if isinstance(prompt, dict) or sequence.token_type_ids:
            raise RequestError("Embeddings are of texts.", param="input")
        if sequence.pooling != replace(WHOLE, dimensions=sequence.pooling.dimensions):
            raise _unknown("pooling of any other kind than its own")
        size = sequence.pooling.dimensions
        more = {} if size is None else {"dimensions": size}
        return "/embeddings", {"model": options.model, "input": [prompt], **more}
    is_chat = isinstance(prompt, dict)
    body = {
        "model": options.model,
        **(prompt if is_chat else {"prompt": prompt}),
        "stream": True,
        "stream_options": {"include_usage": True},
        **_sampling(sequence.params, options, as_text=as_text),
    }
    if sequence.params.grammar is not None:
        body |= _form(sequence.params.grammar, options.server, is_chat=is_chat)
    if options.server == "vllm":
        body["cache_salt"] = sequence.tenant  # prefix caches never cross tenants
        if not is_chat:
            body["return_token_ids"] = True
    return "/chat/completions" if is_chat else "/completions", body


def _sampling(params: SamplingParams, options: Options, *, as_text: bool) -> dict[str, Any]:
    """What is not as usual, and what servers have other defaults for, but for what the request
    leaves to the model: that is the server's to know."""
    body: dict[str, Any] = {options.limit_field: params.max_tokens}
    body |= {
        name: getattr(params, name) for name in ("temperature", "top_p") if name not in params.unset
    }
    changed = {
        name: value
        for name in SamplingParams.__dataclass_fields__
        if name not in _ELSEWHERE and (value := getattr(params, name)) != getattr(_PLAIN, name)
    }
    if as_text:
        for name in _BY_TOKEN:
            if name in changed:
                raise _unknown(name)
    for name, value in changed.items():
        match name:
            case "presence_penalty" | "frequency_penalty" | "seed":
                body[name] = value
            case "stop":
                body[name] = list(value)
            case "logit_bias":
                body[name] = {str(token): bias for token, bias in value}
            case "logprobs" if options.server == "vllm":
                body |= {"logprobs": value, "return_tokens_as_token_ids": True}
            case _ if known := NAMES[options.server].get(name):
                body[known] = list(value) if isinstance(value, tuple) else value
            case _:
                raise _unknown(name)
    return body


def _form(grammar: Grammar, server: str, *, is_chat: bool) -> dict[str, Any]:
    """What the output is to match, in the words of the server."""
    is_json = grammar.kind == "json_schema"
    match server:
        case "vllm":
            return {"structured_outputs": {"json" if is_json else "regex": grammar.text}}
        case "sglang":
            return {"json_schema" if is_json else "regex": grammar.text}
        case "llamacpp" if is_json and not is_chat:
            return {"json_schema": json.loads(grammar.text)}
    if is_json and is_chat:
        schema = {"name": "answer", "schema": json.loads(grammar.text), "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    raise _unknown("response_format" if is_json else "structured_outputs")


def _unknown(name: str) -> RequestError:
    return RequestError(f"This model's server has no {name}.", param=name)
