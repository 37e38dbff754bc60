"""Our sampling parameters in vLLM's words."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Final

from app.engines.checkpoint.generation_config import GenerationRules
from app.errors import ConfigError, RequestError
from app.jobs import Grammar, SamplingParams

UNDONE: Final = (
    *("begin_suppress_tokens", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id"),
    "no_repeat_ngram_size",
)
"""Rules of a model that vLLM has no word for."""

OTHERS: Final[Mapping[str, tuple[object, ...]]] = {
    "num_beams": (1,),
    "length_penalty": (1, 0),
    "early_stopping": (False,),
    "beam": (0,),
    "decoder_start_token_id": (),
    "forced_bos_token_id": (),
}
"""Parameters of searches and of encoder-decoders, and the values that ask for nothing."""

_NO_RULES: Final = GenerationRules()


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
        "prompt_logprobs": params.prompt_logprobs,
        "stop_token_ids": sorted(ends),
        # A grammar that is through lets the model end, and nothing else end it.
        "ignore_eos": params.ignore_eos and params.grammar is None,
        "detokenize": False,
    }


def with_rules(
    params: SamplingParams, rules: GenerationRules, num_prompt_tokens: int
) -> SamplingParams:
    """With what holds for every answer of the model."""
    merged = rules.merged(params)
    least = (merged.min_tokens, rules.min_new_tokens, rules.min_length - num_prompt_tokens)
    never = (*rules.bad_words, *((token,) for token in rules.suppress_tokens))
    return replace(merged, min_tokens=max(least), bad_words=(*merged.bad_words, *never))


def check_rules(rules: GenerationRules) -> None:
    """Raises `ConfigError` for what vLLM has no word for."""
    undone = [name for name in UNDONE if getattr(rules, name) != getattr(_NO_RULES, name)]
    if undone:
        raise ConfigError(
            f"The model's generation_config.json asks for {', '.join(undone)}, which the engine "
            'vllm does not do. Set generation_config = "none" in its entry of models.toml to run '
            "it without its own generation settings, or edit the file."
        )


def check(params: SamplingParams) -> None:
    """Raises `RequestError` for what only other engines do."""
    for name, neutral in OTHERS.items():
        if (value := getattr(params, name)) is not None and value not in neutral:
            raise RequestError(f"The engine vllm has no {name}.", param=name)


def form(grammar: Grammar) -> dict[str, str]:
    """Keyword arguments of `vllm.sampling_params.StructuredOutputsParams`."""
    return {"regex" if grammar.kind == "regex" else "json": grammar.text}
