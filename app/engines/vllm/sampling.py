"""Our sampling parameters in vLLM's words."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from app.jobs import Grammar, SamplingParams


def arguments(params: SamplingParams, eos_token_ids: Collection[int]) -> dict[str, Any]:
    """Keyword arguments of `vllm.SamplingParams`, but for the grammar's and `bad_words`' own types.

    Texts are made here, as for every other engine, and so stop strings are found here.
    """
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
    return {
        "max_tokens": params.max_tokens,
        "min_tokens": min(params.min_tokens, params.max_tokens),
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
        "logit_bias": dict(params.logit_bias) or None,
        "seed": params.seed,
        "logprobs": params.logprobs,
        "stop_token_ids": sorted(ends),
        # A grammar that is through lets the model end, and nothing else end it.
        "ignore_eos": params.ignore_eos and params.grammar is None,
        "detokenize": False,
    }


def form(grammar: Grammar) -> dict[str, str]:
    """Keyword arguments of `vllm.sampling_params.StructuredOutputsParams`."""
    return {"regex" if grammar.kind == "regex" else "json": grammar.text}
