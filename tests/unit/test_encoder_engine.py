"""Embeddings: pooled as the model's files say, the same in any company."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from app.config.settings import ModelSettings
from app.engines.base import Engine, Generation, Progress, Sequence
from app.engines.registry import create
from app.errors import ConfigError
from app.jobs import FinishReason, Kind, SamplingParams
from tests.unit import tiny_models
from tests.unit.tiny_models import CONTEXT, VOCAB

TEXTS = ["water", "a", "the old mill by the river turns all day long", "stone on stone", "wheel"]


def load(folder: Path, progress: Progress = lambda: None) -> Engine:
    settings = ModelSettings(source=str(folder), kind=Kind.EMBED, engine="encoder", dtype="float32")
    return create("encoder", folder, settings, device="cpu", threads=1, progress=progress)


def sequence(id_: int, text: str) -> Sequence:
    return Sequence(id_, tuple(text.encode()))


def run(engine: Engine, *sequences: Sequence) -> list[Generation]:
    engine.admit("batch", sequences)
    return engine.step()


def vectors(answers: list[Generation]) -> Tensor:
    return torch.tensor([answer.embedding for answer in answers])


def tokens_of(folder: Path, text: str) -> Tensor:
    """Token vectors of one text alone, [tokens, size]."""
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        hidden: Tensor = model(torch.tensor([list(text.encode())])).last_hidden_state[0]
    return hidden


@pytest.mark.parametrize(
    ("pooling", "pool"),
    [
        ("mean_tokens", lambda tokens: tokens.mean(0)),
        ("cls_token", lambda tokens: tokens[0]),
        ("lasttoken", lambda tokens: tokens[-1]),
        ("max_tokens", lambda tokens: tokens.amax(0)),
    ],
)
def test_vectors_are_pooled_as_the_folder_says_and_have_length_one(
    tmp_path: Path, pooling: str, pool: Callable[[Tensor], Tensor]
) -> None:
    folder = tiny_models.save_bert(tmp_path / "bert", pooling=pooling)

    found = vectors(run(load(folder), *(sequence(i, text) for i, text in enumerate(TEXTS))))

    expected = torch.stack([pool(tokens_of(folder, text)) for text in TEXTS])
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_company_does_not_change_a_vector(tmp_path: Path) -> None:
    engine = load(tiny_models.save_bert(tmp_path / "bert"))

    together = vectors(run(engine, *(sequence(i, text) for i, text in enumerate(TEXTS))))
    alone = torch.cat([vectors(run(engine, sequence(9, text))) for text in TEXTS])

    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_answers_come_in_the_order_they_were_admitted(tmp_path: Path) -> None:
    engine = load(tiny_models.save_bert(tmp_path / "bert"))

    answers = run(engine, *(sequence(i, text) for i, text in enumerate(TEXTS)))

    assert [answer.sequence_id for answer in answers] == list(range(len(TEXTS)))
    assert [answer.input_tokens for answer in answers] == [len(text) for text in TEXTS]
    assert {answer.finish_reason for answer in answers} == {FinishReason.STOP}


def test_a_plain_bert_is_pooled_by_the_mean(tmp_path: Path) -> None:
    folder = tiny_models.save_bert(tmp_path / "bert", modules=False)

    found = vectors(run(load(folder), sequence(1, "water")))[0]

    expected = tokens_of(folder, "water").mean(0)
    torch.testing.assert_close(found, expected / expected.norm(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"modules.json": [{"type": "st.models.Dense", "path": "2_Dense"}]}, "no module Dense"),
        ({"1_Pooling/config.json": {"pooling_mode": "weightedmean"}}, "not by weightedmean"),
        (
            {"1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_max": True}},
            r"not by cls\+max",
        ),
    ],
)
def test_what_would_change_the_vectors_is_refused(
    tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    folder = tiny_models.save_bert(tmp_path / "bert")
    for name, content in change.items():
        (folder / name).write_text(json.dumps(content))

    with pytest.raises(ConfigError, match=reason):
        load(folder)


def test_a_vector_that_is_not_finite_fails_alone(tmp_path: Path) -> None:
    folder = tiny_models.save_bert(tmp_path / "bert")
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32)
    model.embeddings.word_embeddings.weight.data[ord("!")] = float("nan")
    model.save_pretrained(folder)

    bad, good = run(load(folder), sequence(1, "wow!!"), sequence(2, "water"))

    assert (bad.finish_reason, bad.error_code) == (FinishReason.ERROR, "not_finite")
    assert bad.embedding is None
    assert good.finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    "wrong",
    [
        Sequence(1, (VOCAB,)),
        Sequence(1, (5,) * (CONTEXT + 1)),
        Sequence(1, (5,), SamplingParams(1)),
    ],
)
def test_what_the_model_cannot_take_fails_alone(tmp_path: Path, wrong: Sequence) -> None:
    engine = load(tiny_models.save_bert(tmp_path / "bert"))

    bad, good = run(engine, wrong, sequence(2, "water"))

    assert bad.finish_reason is FinishReason.ERROR
    assert good.finish_reason is FinishReason.STOP


def test_device_time_is_shared_out_exactly_and_padding_is_counted(tmp_path: Path) -> None:
    engine = load(tiny_models.save_bert(tmp_path / "bert"))

    answers = run(engine, sequence(1, "waters"), sequence(2, "wheel"), sequence(3, "a" * 40))

    [stats] = engine.take_stats()
    assert stats.device_ns == sum(answer.device_ns for answer in answers)
    assert (stats.rows, stats.useful_tokens, stats.padded_tokens) == (3, 51, 52)
    assert answers[0].device_ns > answers[1].device_ns > 0


def test_a_cancelled_sequence_is_not_run(tmp_path: Path) -> None:
    engine = load(tiny_models.save_bert(tmp_path / "bert"))
    engine.cancel(1)

    cancelled, mate = run(engine, sequence(1, "water"), sequence(2, "wheel"))

    assert (cancelled.finish_reason, cancelled.embedding) == (FinishReason.CANCELLED, None)
    assert mate.embedding is not None
