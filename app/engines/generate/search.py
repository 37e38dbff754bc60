"""Whether and how an answer is searched for with beams, rather than drawn token by token. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from app.engines.checkpoint.generation_config import GenerationRules
from app.errors import RequestError
from app.jobs import SamplingParams


@dataclass(frozen=True, slots=True)
class Search:
    """Sequences of the same search may share a batch: it has one length and one end."""

    num_beams: int
    length_penalty: float
    early_stopping: bool | str
    max_tokens: int
    min_tokens: int
    repetition_penalty: float
    bad_words: tuple[tuple[int, ...], ...]


def search_of(params: SamplingParams, rules: GenerationRules) -> Search | None:
    """The search that a request asks for, or else the model's own generation settings; None where
    tokens are drawn.

    What only draws can do keeps the model's own beams away. Raises `RequestError` if the request
    asks for both, or for more answers than beams.
    """
    num_beams = rules.num_beams if params.num_beams is None else params.num_beams
    if num_beams == 1:
        return None
    if other := _drawn_only(params):
        if params.num_beams is None:
            return None
        raise RequestError(f"{other} does not go with num_beams.", param=other)
    if params.beam >= num_beams:
        raise RequestError(f"n is at most num_beams, {num_beams}.", param="n")
    penalty, stopping = params.length_penalty, params.early_stopping
    return Search(
        num_beams,
        rules.length_penalty if penalty is None else penalty,
        rules.early_stopping if stopping is None else stopping,
        params.max_tokens,
        params.min_tokens,
        rules.merged(params).repetition_penalty,
        params.bad_words,
    )


def _drawn_only(params: SamplingParams) -> str | None:
    """The first field of a request that a search cannot heed."""
    asked = {
        "stop": params.stop,
        "stop_token_ids": params.stop_token_ids,
        "logprobs": params.logprobs is not None,
        "logit_bias": params.logit_bias,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "ignore_eos": params.ignore_eos,
        "response_format": params.grammar,
    }
    return next((name for name, value in asked.items() if value), None)
