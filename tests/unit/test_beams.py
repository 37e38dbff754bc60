"""Beam search: the same answers as transformers' `generate` for each prompt alone."""

from __future__ import annotations

import itertools
from itertools import dropwhile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from app.config.settings import ModelSettings
from app.engines.base import Engine, Generation, Sequence
from app.engines.checkpoint.generation_config import GenerationRules
from app.engines.generate.search import search_of
from app.engines.registry import create
from app.errors import RequestError
from app.jobs import FinishReason, Grammar, Kind, SamplingParams
from tests.unit import tiny_models
from tests.unit.tiny_models import CONTEXT, EOS
from tests.unit.tiny_pairs import PAIRS, save_pair

PROMPTS = ["a", "the mill wheel", "stone", "water runs down to the old mill by the river", "?!"]
OWN = {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True, "no_repeat_ngram_size": 3}


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair("bart", tmp_path_factory.mktemp("bart") / "model")


def load(folder: Path, progress: Any = lambda: None, **settings: Any) -> Engine:
    given = ModelSettings(
        source=str(folder),
        kind=Kind.GENERATE,
        engine="generate",
        dtype="float32",
        context_tokens=CONTEXT,
        **settings,
    )
    return create("generate", folder, given, device="cpu", threads=1, progress=progress)


def asked(id_: int, prompt: str, max_tokens: int = 12, **params: Any) -> Sequence:
    return Sequence(
        id_, (*prompt.encode(), EOS), SamplingParams(max_tokens, temperature=0.0, **params)
    )


def run(engine: Engine, *sequences: Sequence) -> list[Generation]:
    engine.admit("batch", sequences)
    ended: dict[int, Generation] = {}
    while engine.has_work:
        ended |= {each.sequence_id: each for each in engine.step()}
    return [ended[each.id] for each in sequences]


def alone(folder: Path, prompt: str, max_tokens: int = 12, **how: Any) -> list[list[int]]:
    """What transformers gives to one prompt with a model that has seen no other: all it returns."""
    kind: Any = AutoModelForCausalLM if "llama" in str(folder) else AutoModelForSeq2SeqLM
    model = kind.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.pad_token_id = pad = (
        tiny_models.PAD if model.config.pad_token_id is None else model.config.pad_token_id
    )
    ids = torch.tensor([[*prompt.encode(), EOS]])
    begin = ids.shape[1] if "llama" in str(folder) else 1
    outs = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, **how
    )
    return [
        [*reversed([*dropwhile(lambda each: each == pad, reversed(out[begin:]))])]
        for out in outs.tolist()
    ]


@pytest.mark.parametrize("kind", PAIRS)
def test_searches_and_draws_in_company_give_what_transformers_gives_alone(
    kind: str, tmp_path: Path
) -> None:
    # given an encoder-decoder, and requests of all kinds for one batch
    folder = save_pair(kind, tmp_path / "model")
    engine = load(folder)
    ways: list[dict[str, Any]] = [
        {"num_beams": 3},
        {"num_beams": 2, "length_penalty": 0.2, "early_stopping": True},
        {},
    ]
    crowd = [
        (prompt, most, how)
        for (place, prompt), how in itertools.product(enumerate(PROMPTS), ways)
        for most in [12 if place % 2 else 5]
    ]

    # when
    answers = run(engine, *(asked(i, p, most, **how) for i, (p, most, how) in enumerate(crowd)))

    # then
    for answer, (prompt, most, how) in zip(answers, crowd, strict=True):
        [expected] = alone(folder, prompt, most, **how)
        assert answer.token_ids == expected, (prompt, how)
    assert len({tuple(answer.token_ids) for answer in answers}) > 2


def test_a_decoder_searches_too(tmp_path: Path) -> None:
    folder = tiny_models.save_llama(tmp_path / "llama")

    answers = run(load(folder), *(asked(i, p, num_beams=3) for i, p in enumerate(PROMPTS)))

    assert [each.token_ids for each in answers] == [
        alone(folder, prompt, num_beams=3)[0] for prompt in PROMPTS
    ]


def test_a_models_own_beams_hold_where_a_request_does_not_say(tmp_path: Path) -> None:
    folder = save_pair("bart", tmp_path / "model", **OWN)
    engine = load(folder)

    own, one, fewer, logprobs = run(
        engine,
        asked(1, "the mill"),
        asked(2, "the mill", num_beams=1),
        asked(3, "the mill", length_penalty=0.1, num_beams=2),
        asked(4, "the mill", logprobs=0),
    )

    assert own.token_ids == alone(folder, "the mill")[0]
    assert own.token_ids != one.token_ids
    assert fewer.token_ids == alone(folder, "the mill", num_beams=2, length_penalty=0.1)[0]
    assert logprobs.token_ids == one.token_ids, "what only draws can do keeps them away"
    assert logprobs.logprobs is not None


def test_n_answers_are_the_best_ends_of_one_search(bart: Path) -> None:
    engine = load(bart)
    crowd = [asked(i, "the mill wheel", num_beams=4, beam=i) for i in range(3)]

    answers = run(engine, *crowd, asked(3, "stone", num_beams=4))

    expected = alone(bart, "the mill wheel", num_beams=4, num_return_sequences=3)
    assert [each.token_ids for each in answers[:3]] == expected
    assert answers[3].token_ids == alone(bart, "stone", num_beams=4)[0]
    [stats] = engine.take_stats()
    assert stats.device_ns == sum(each.device_ns for each in answers)
    assert all(each.device_ns > 0 for each in answers)
    assert all(0 < each.breakdown.prefill_ns < each.device_ns for each in answers if each.breakdown)
    assert [each.input_tokens for each in answers] == [15, 15, 15, 6]
    assert stats.useful_tokens == 15 + 6 + sum(len(each.token_ids) for each in answers)


def test_a_batch_computes_no_more_rows_than_the_model_may_have(bart: Path) -> None:
    engine = load(bart, max_batch_size=8)

    answers = run(engine, *(asked(i, prompt, num_beams=4) for i, prompt in enumerate(PROMPTS)))

    assert [each.rows for each in engine.take_stats()] == [2, 2, 1]
    assert [each.token_ids for each in answers] == [
        alone(bart, prompt, num_beams=4)[0] for prompt in PROMPTS
    ]


def test_a_cancelled_search_ends_within_a_step_and_its_mates_go_on(bart: Path) -> None:
    steps: list[None] = []

    def progress() -> None:
        steps.append(None)
        if len(steps) == 3:
            engine.cancel(1)

    engine = load(bart, progress)

    cancelled, mate = run(
        engine,
        asked(1, "the mill wheel", 60, num_beams=3, min_tokens=60),
        asked(2, "stone", 60, num_beams=3, min_tokens=60),
    )

    assert cancelled.finish_reason is FinishReason.CANCELLED
    assert 0 < len(cancelled.token_ids) <= 4
    assert mate.token_ids == alone(bart, "stone", 60, num_beams=3, min_new_tokens=60)[0]
    steps.clear()
    run(engine, asked(1, "stone", 60, num_beams=3, min_tokens=60))
    assert len(steps) <= 4, "alone it ends the batch"


def test_a_search_without_finite_scores_fails_alone(bart: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(bart, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.model.encoder.embed_tokens = torch.nn.Embedding.from_pretrained(
        model.model.shared.weight.detach().clone()
    )
    model.model.encoder.embed_tokens.weight.data[ord("!")] = float("nan")
    engine = load(bart)
    engine._model = model  # type: ignore[attr-defined]
    model.generation_config = load(bart)._model.generation_config  # type: ignore[attr-defined]

    bad, good = run(engine, asked(1, "oh!", num_beams=3), asked(2, "stone", num_beams=3))

    assert (bad.finish_reason, bad.error_code) == (FinishReason.ERROR, "not_finite")
    assert good.token_ids == alone(bart, "stone", num_beams=3)[0]


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"stop": ("a",)}, "stop"),
        ({"logprobs": 1}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"grammar": Grammar("regex", "a")}, "response_format"),
        ({"beam": 3}, "n is at most num_beams, 3"),
    ],
)
def test_what_no_search_can_do_is_refused_by_name(params: dict[str, Any], named: str) -> None:
    with pytest.raises(RequestError, match=named):
        search_of(SamplingParams(5, num_beams=3, **params), GenerationRules())


def test_more_beams_than_rows_are_refused(bart: Path) -> None:
    [refused] = run(load(bart, max_batch_size=2), asked(1, "a", num_beams=3))

    assert refused.finish_reason is FinishReason.ERROR
    assert "num_beams is at most this model's max_batch_size, 2" in (refused.error_message or "")


def test_each_rows_output_may_begin_with_another_token(bart: Path) -> None:
    engine = load(bart)
    crowd = [
        asked(1, "stone", num_beams=3, forced_bos_token_id=65),
        asked(2, "stone", num_beams=3, forced_bos_token_id=66),
        asked(3, "stone", forced_bos_token_id=65),
        asked(4, "stone", decoder_start_token_id=67),
        asked(5, "stone"),
    ]

    answers = [each.token_ids for each in run(engine, *crowd)]

    assert answers[0] == alone(bart, "stone", num_beams=3, forced_bos_token_id=65)[0]
    assert answers[1] == alone(bart, "stone", num_beams=3, forced_bos_token_id=66)[0]
    assert answers[2] == alone(bart, "stone", forced_bos_token_id=65)[0]
    assert answers[3] == alone(bart, "stone", decoder_start_token_id=67)[0]
    assert answers[4] == alone(bart, "stone")[0]
