"""Which sequences may share a batch without changing each other's tokens.

Padding is masked, but not every model is blind to it: a recurrent one takes it into its state, and
some rotary embeddings go by the longest row of the batch. A trial at load tells. It runs a few
prompts alone, then together, and compares the scores of the first tokens, each time with the same
forced ones, so that the way that is tried is the way that is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import Module
from transformers import LogitsProcessor

BLOCK_SPARSE: Final = "block_sparse"

TOLERANCE: Final = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of a step's scores, root mean square, as a part of their spread: of the row in
the middle, since one row may be routed to another expert by a rounding error.

Batches of other shapes are added up in another order. Of 150 kinds of models with random weights
that moved the scores by at most 6e-6 in float32, 8e-3 in float16 and 5e-2 in bfloat16, of a trained
one of 30 layers by 6e-6, 8e-3 and 9e-2; padding that counts moved them by 1e-2 to 1. Whatever is
smaller than this does no more to a text than rounding does.
"""

LENGTHS: Final = (1, 5, 11, 23)
"""Of prompts that are tried side by side."""

STEPS: Final = 3
"""Tokens that are tried: the first comes from the prompt's pass, the others from the cache."""

AFFORDABLE: Final = 2e11
"""Parameters times tokens of a trial beyond a threshold, on a CPU: some seconds."""


@dataclass(frozen=True, slots=True)
class Company:
    padded_tokens: float  #: rows of any lengths share a batch that spans no more tokens than this
    equal_lengths: bool  #: beyond that, rows of one length do

    def __str__(self) -> str:
        beyond = "by equal length" if self.equal_lengths else "one at a time"
        if self.padded_tokens == math.inf:
            return "padded batches"
        if not self.padded_tokens:
            return f"{beyond}: padding would change its answers"
        return f"padded batches up to {self.padded_tokens:,} tokens, longer ones {beyond}"

    def allows(self, lengths: Seq[int], output: int) -> bool:
        """Whether prompts of these lengths may share a batch that gives up to `output` tokens."""
        if len(lengths) == 1 or max(lengths) + output <= self.padded_tokens:
            return True
        return self.equal_lengths and len(set(lengths)) == 1


Scores = Callable[[Seq[Seq[int]], int], Tensor]
"""The scores, [rows, steps, vocab] in float32, with which a model goes on from prompts that it is
given together; each row is told which tokens to take."""


def try_company(
    scores: Scores, vocab: int, dtype: torch.dtype, context: int, thresholds: Mapping[int, bool]
) -> Company:
    """What the model's rows do to each other, alike at every call.

    `thresholds` are lengths beyond which it may work another way, and whether that may be tried:
    if not, it is taken for granted.
    """
    same = _same(scores, dtype)
    lengths = [each for each in LENGTHS if each + STEPS <= context] or [1]
    if not same([_prompt(length, vocab) for length in lengths]):
        return Company(0, same([_prompt(lengths[-1], vocab, start) for start in range(3)]))
    for threshold, may_be_tried in sorted(thresholds.items()):
        long = _prompt(min(threshold + 1, context - STEPS), vocab)
        if not (may_be_tried and same([_prompt(lengths[-1], vocab), long])):
            return Company(threshold, equal_lengths=True)
    return Company(math.inf, equal_lengths=True)


def _same(scores: Scores, dtype: torch.dtype) -> Callable[[Seq[Seq[int]]], bool]:
    """Whether prompts go on in each other's company as they do alone."""

    def same(prompts: Seq[Seq[int]]) -> bool:
        alone = torch.cat([scores([prompt], STEPS) for prompt in prompts])
        moved = _difference(alone, scores(prompts, STEPS))
        padded = [len(prompt) < max(map(len, prompts)) for prompt in prompts]
        moved = moved[padded] if any(padded) else moved
        return bool((moved.median(dim=0).values <= TOLERANCE[dtype]).all())

    return same


def _difference(alone: Tensor, together: Tensor) -> Tensor:
    """Of scores, [rows, steps, vocab] → [rows, steps]. What the model's own settings rule out is
    -inf in both."""
    known = alone.isfinite() & together.isfinite()
    alone, together = alone.where(known, 0.0), together.where(known, 0.0)
    error = (alone - together).square().mean(-1).sqrt()
    return error / alone.std(-1).clamp(min=torch.finfo(torch.float32).tiny)


def _prompt(length: int, vocab: int, start: int = 0) -> list[int]:
    """Tokens from the middle of the vocabulary: special ones are at its ends."""
    return [
        vocab // 4 + (7 * place * place + 13 * place + 31 * start) % (vocab // 2)
        for place in range(1, length + 1)
    ]


def thresholds(config: Any) -> Iterator[int]:
    """Lengths beyond which a model works another way, and in a batch goes by the longest row."""
    text = config.get_text_config(decoder=True)
    for rope in _ropes(getattr(text, "rope_parameters", None) or {}):
        if rope["rope_type"] == "longrope":
            yield rope["original_max_position_embeddings"]
    if getattr(config, "attention_type", None) == BLOCK_SPARSE:
        yield (5 + 2 * config.num_random_blocks) * config.block_size


def _ropes(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All parameters of rotary embeddings: one set, or one for each type of layers."""
    if "rope_type" in found:
        yield found
    else:
        for each in found.values():
            if isinstance(each, dict):
                yield from _ropes(each)


class Memory:
    """What a model's modules keep of the rows that they ran, and later rows would go by.

    RecurrentGemma goes on from the last batch's state where a prompt has one token; the encoder of
    BigBird leaves its sparse attention for good at the first short row.
    """

    def __init__(self, model: Any) -> None:
        """Of a model as it was loaded."""
        self._loaded = [(vars(module), _attributes(module)) for module in model.modules()]

    def forget(self) -> None:
        for now, loaded in self._loaded:
            now.update(loaded | {"_modules": loaded["_modules"].copy()})


def _attributes(module: Module) -> dict[str, Any]:
    return vars(module) | {"_modules": vars(module)["_modules"].copy()}


class Told(LogitsProcessor):
    """Keeps the scores of each step, and lets all rows take the same token whatever they are."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []  #: [rows, vocab] of each step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        vocab = scores.shape[1]
        token = vocab // 4 + (17 * len(self.scores) + 5) % (vocab // 2)
        self.scores.append(scores.float())
        told = torch.full_like(scores, float("-inf"))
        told[:, token] = 0.0
        return told
