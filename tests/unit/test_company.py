"""What may share a batch of `generate`: nobody's tokens depend on his company."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BigBirdPegasusConfig,
    BigBirdPegasusForConditionalGeneration,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from app.config.settings import ModelSettings
from app.engines.base import Engine, Sequence
from app.engines.checkpoint.generation_config import GenerationRules
from app.engines.generate.company import Company, try_company
from app.engines.generate.engine import GenerateEngine
from app.engines.registry import create
from app.jobs import FinishReason, Kind, SamplingParams
from tests.unit import tiny_models
from tests.unit.tiny_models import BOS, EOS, PAD, VOCAB

CONTEXT = 160
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "max_position_embeddings": CONTEXT,
}


def rwkv() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "context_length": CONTEXT}
    return RwkvForCausalLM(RwkvConfig(vocab_size=VOCAB, eos_token_id=EOS, **sizes))


def recurrent_gemma() -> PreTrainedModel:
    sizes = {"lru_width": 32, "attention_window_size": 16}
    return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SMALL, **sizes))


def minimax() -> PreTrainedModel:
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "block_size": 8}
    return MiniMaxForCausalLM(MiniMaxConfig(**SMALL, **sizes))


def longrope() -> PreTrainedModel:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [6.0, 5.0, 4.0, 3.0],
    }
    limits = {"original_max_position_embeddings": 32}
    return Phi3ForCausalLM(Phi3Config(**SMALL, **limits, rope_parameters=rope))


def big_bird() -> PreTrainedModel:
    config = BigBirdPegasusConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        block_size=4,
        num_random_blocks=1,
        max_position_embeddings=CONTEXT,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        decoder_start_token_id=BOS,
    )
    return BigBirdPegasusForConditionalGeneration(config)


def folder_of(make: Callable[[], PreTrainedModel], folder: Path) -> Path:
    torch.manual_seed(5)
    return tiny_models.save(make().eval(), folder)


def load(folder: Path) -> Engine:
    given = ModelSettings(
        source=str(folder),
        kind=Kind.GENERATE,
        engine="generate",
        dtype="float32",
        context_tokens=CONTEXT,
    )
    return create("generate", folder, given, device="cpu", threads=1, progress=lambda: None)


def sequence(id_: int, length: int, max_tokens: int = 12) -> Sequence:
    prompt = tuple((11 * place * place + 7 * id_) % 250 for place in range(1, length + 1))
    params = SamplingParams(max_tokens, temperature=0.0, ignore_eos=True)
    return Sequence(id_, prompt, params)


def answers(engine: Engine, *sequences: Sequence) -> dict[int, list[int]]:
    """Token ids by sequence."""
    engine.admit("batch", sequences)
    ended = {}
    while engine.has_work:
        ended |= {each.sequence_id: each.token_ids for each in engine.step()}
    return ended


def alone(folder: Path, each: Sequence) -> list[int]:
    """What transformers gives to one prompt, with a model that has seen no other."""
    assert each.params
    is_pair = (folder / "config.json").read_text().count("BigBirdPegasusForConditional")
    kind: Any = AutoModelForSeq2SeqLM if is_pair else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([each.prompt_token_ids])
    [out] = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=PAD,
        max_new_tokens=each.params.max_tokens,
    ).tolist()  # fmt: skip
    return out[1:] if is_pair else out[ids.shape[1] :]


@pytest.mark.parametrize(
    ("make", "how"),
    [
        (rwkv, "one at a time: padding would change its answers"),
        (recurrent_gemma, "by equal length: padding would change its answers"),
        (minimax, "padded batches"),
        (longrope, "padded batches up to 32 tokens, longer ones by equal length"),
        (big_bird, "padded batches up to 28 tokens, longer ones by equal length"),
    ],
    ids=lambda it: getattr(it, "__name__", None),
)
def test_a_model_answers_in_company_as_alone_whatever_its_padding_does(
    make: Callable[[], PreTrainedModel], how: str, tmp_path: Path
) -> None:
    # given
    folder = folder_of(make, tmp_path / "model")
    engine = load(folder)
    lengths = [3, 60, 9, 9, 1, 17, 60, 30, 3, 9]
    crowd = [sequence(place, length) for place, length in enumerate(lengths)]

    # when
    together = answers(engine, *crowd)

    # then
    assert together == {each.id: alone(folder, each) for each in crowd}
    assert getattr(engine, "kernels") == f"torch, {how}"  # noqa: B009


class Rows:
    """Scores of a made-up model, [rows, steps, vocab], which `mix` may change in company."""

    def __init__(self, mix: Callable[[Tensor, Seq[Seq[int]]], Tensor]) -> None:
        self._mix = mix

    def __call__(self, prompts: Seq[Seq[int]], steps: int) -> Tensor:
        own = [torch.sin(torch.arange(steps * 50.0) * sum(prompt)) for prompt in prompts]
        return self._mix(torch.stack(own).view(len(prompts), steps, 50), prompts)


def tried(mix: Callable[[Tensor, Seq[Seq[int]]], Tensor], **limits: Any) -> Company:
    given = {"dtype": torch.float32, "context": 200, "thresholds": {}} | limits
    return try_company(Rows(mix), 50, **given)


def test_what_rows_do_to_each_other_decides_who_may_share_a_batch() -> None:
    def noise(rows: Tensor, prompts: Seq[Seq[int]]) -> Tensor:
        return rows + 1e-6 * len(prompts)

    def by_mates(rows: Tensor, prompts: Seq[Seq[int]]) -> Tensor:
        return rows + 0.01 * rows.mean(0)

    def by_padding(rows: Tensor, prompts: Seq[Seq[int]]) -> Tensor:
        padding = torch.tensor([max(map(len, prompts)) - len(prompt) for prompt in prompts])
        return rows * (1 + 0.001 * padding[:, None, None] * torch.linspace(0, 1, 50))

    def by_the_longest(rows: Tensor, prompts: Seq[Seq[int]]) -> Tensor:
        return rows.flip(-1) if max(map(len, prompts)) > 100 else rows

    assert tried(noise) == Company(math.inf, True)
    assert tried(by_mates) == Company(0, False)
    assert tried(by_padding) == Company(0, True)
    assert tried(by_the_longest) == Company(math.inf, True), "nobody said where to look"
    assert tried(by_the_longest, thresholds={100: True}) == Company(100, True)
    assert tried(noise, thresholds={100: True}) == Company(math.inf, True)
    assert tried(noise, thresholds={100: False}) == Company(100, True), "it may not be tried"


def test_one_row_that_rounding_sends_another_way_decides_nothing() -> None:
    def one_flips(rows: Tensor, prompts: Seq[Seq[int]]) -> Tensor:
        return torch.cat([rows[:1].flip(-1), rows[1:]]) if len(prompts) > 1 else rows

    assert tried(one_flips) == Company(math.inf, True)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), min_size=1, max_size=12),
    company=st.builds(Company, st.sampled_from([0, 32, math.inf]), st.booleans()),
)
def test_parts_of_any_batch_hold_everybody_once_and_only_who_may_share(
    lengths: list[tuple[int, int]], company: Company
) -> None:
    engine = object.__new__(GenerateEngine)
    engine._company = company
    engine._rules = GenerationRules()
    engine._tokenizer = SimpleNamespace(separate_output=False, context_tokens=90)  # type: ignore
    crowd = [sequence(place, *each) for place, each in enumerate(lengths)]

    parts = engine._split(crowd)

    assert sorted(each.id for part in parts for each in part) == list(range(len(crowd)))
    for part in (each for each in parts if len(each) > 1):
        longest = max(len(each.prompt_token_ids) for each in part)
        span = longest + max(each.params.max_tokens for each in part if each.params)
        is_equal = len({len(each.prompt_token_ids) for each in part}) == 1
        assert span <= 90
        assert span <= company.padded_tokens or (company.equal_lengths and is_equal)


def test_each_part_is_answered_when_it_is_done_and_a_cancel_reaches_those_still_to_come(
    tmp_path: Path,
) -> None:
    engine = load(folder_of(recurrent_gemma, tmp_path / "model"))
    engine.admit("batch", [sequence(1, 9), sequence(2, 3), sequence(3, 5), sequence(4, 3)])

    first = engine.step()
    engine.cancel(3)
    second = engine.step()
    third = engine.step()

    assert [each.sequence_id for each in first] == [2, 4]
    assert (second[0].finish_reason, second[0].token_ids) == (FinishReason.CANCELLED, [])
    assert third[0].finish_reason is FinishReason.LENGTH
    assert not engine.has_work
    stats = engine.take_stats()
    assert [each.rows for each in stats] == [2, 0, 1]
    assert sum(each.device_ns for each in stats) == sum(
        each.device_ns for each in [*first, *second, *third]
    )
