"""Embeddings: pooled as the model's files say, the same in any company."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel

from app.config.settings import ModelSettings
from app.engines.base import Engine, Generation, Progress, Sequence
from app.engines.registry import create
from app.errors import ConfigError
from app.jobs import FinishReason, Kind, PoolingParams, SamplingParams
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


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_tokens": lambda tokens: tokens.mean(0),
    "cls_token": lambda tokens: tokens[0],
    "lasttoken": lambda tokens: tokens[-1],
    "max_tokens": lambda tokens: tokens.amax(0),
    "mean_sqrt_len_tokens": lambda tokens: tokens.sum(0) / len(tokens) ** 0.5,
    "weightedmean_tokens": lambda tokens: (
        (tokens * torch.arange(1, len(tokens) + 1)[:, None]).sum(0)
        / (len(tokens) * (len(tokens) + 1) / 2)
    ),
}


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("pooling", POOLS)
def test_vectors_are_pooled_as_the_folder_says_and_have_length_one(
    tmp_path: Path, pooling: str
) -> None:
    folder = tiny_models.save_bert(tmp_path / "bert", pooling=pooling)

    found = vectors(run(load(folder), *(sequence(i, text) for i, text in enumerate(TEXTS))))

    expected = torch.stack([POOLS[pooling](tokens_of(folder, text)) for text in TEXTS])
    torch.testing.assert_close(found, unit(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
        {"pooling_mode": "mean+cls"},
        {"pooling_mode": ["cls", "mean"]},
    ],
)
def test_several_poolings_are_put_one_behind_the_other_in_their_own_order(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = tiny_models.save_bert(tmp_path / "bert")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))

    [found] = vectors(run(load(folder), sequence(1, "water")))

    tokens = tokens_of(folder, "water")
    expected = unit(torch.cat([tokens[0], tokens.mean(0)]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def add_module(
    folder: Path, name: str, config: dict[str, Any], weights: dict[str, Tensor] | None = None
) -> None:
    """A module behind the pooling, before Normalize."""
    modules = json.loads((folder / "modules.json").read_text())
    path = f"{len(modules)}_{name}"
    modules.insert(-1, {"idx": 9, "path": path, "type": f"sentence_transformers.models.{name}"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / path).mkdir()
    (folder / path / "config.json").write_text(json.dumps(config))
    if weights is not None:
        save_file(weights, folder / path / "model.safetensors")


DENSE = {"in_features": 32, "out_features": 12, "bias": True}


def test_layers_behind_the_pooling_are_run(tmp_path: Path) -> None:
    folder = tiny_models.save_bert(tmp_path / "bert")
    tanh = "torch.nn.modules.activation.Tanh"
    weight, bias, scale = torch.randn(12, 32), torch.randn(12), torch.rand(12)
    dense = {"linear.weight": weight, "linear.bias": bias}
    add_module(folder, "Dropout", {"dropout": 0.5})
    add_module(folder, "Dense", DENSE | {"activation_function": tanh}, dense)
    norm = {"norm.weight": scale, "norm.bias": bias}
    add_module(folder, "LayerNorm", {"dimension": 12}, norm)

    [found] = vectors(run(load(folder), sequence(1, "water")))

    layer = torch.tanh(weight @ tokens_of(folder, "water").mean(0) + bias)
    expected = torch.nn.functional.layer_norm(layer, [12], scale, bias)
    torch.testing.assert_close(found, unit(expected), atol=1e-5, rtol=0)


def test_a_vector_is_given_as_it_was_asked_for(tmp_path: Path) -> None:
    engine = load(tiny_models.save_bert(tmp_path / "bert"))
    asked = [
        PoolingParams(),
        PoolingParams(use_activation=False),
        PoolingParams(dimensions=8),
        PoolingParams(dimensions=8, use_activation=False),
        PoolingParams(skip=2),
    ]
    sequences = [Sequence(i, tuple(b"water"), pooling=each) for i, each in enumerate(asked)]

    found = [torch.tensor(answer.embedding) for answer in run(engine, *sequences)]

    tokens = tokens_of(tmp_path / "bert", "water")
    whole = tokens.mean(0)
    expected = [unit(whole), whole, unit(whole[:8]), whole[:8], unit(tokens[2:].mean(0))]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


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

    expected = unit(tokens_of(folder, "water").mean(0))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"modules.json": [{"type": "st.models.WordWeights", "path": ""}]},
            "no module WordWeights",
        ),
        ({"modules.json": [{"type": "st.models.Pooling", "path": "1_Pooling"}]}, "does not begin"),
        ({"modules.json": [{"type": "st.Transformer", "path": "0_Transformer"}]}, "move its files"),
        ({"1_Pooling/config.json": {"pooling_mode": "median"}}, "not by median"),
        ({"1_Pooling/config.json": {"pooling_mode_mean_tokens": False}}, "names no mode"),
        ({"sentence_bert_config.json": {"model_args": {"x": 1}}}, "asks for model_args"),
        ({"sentence_roberta_config.json": {"tokens": 1}}, "asks for tokens"),
        ({"config_sentence_transformers.json": {"model_type": "SparseEncoder"}}, "model_type"),
        ({"config_sentence_transformers.json": {"default_prompt_name": "q"}}, "default prompt q"),
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


@pytest.mark.parametrize(
    ("config", "weights", "reason"),
    [
        (DENSE | {"activation_function": "torch.nn.modules.linear.Bilinear"}, {}, "no activation"),
        (DENSE | {"activation_function": "os.Tanh"}, {}, "no activation os.Tanh"),
        (DENSE | {"module_input_name": "token_embeddings"}, {}, "module_input_name"),
        (DENSE | {"in_features": None}, {}, "no usable in_features"),
        (DENSE, None, "pickled weights are not loaded"),
        (DENSE, {"linear.weight": torch.zeros(3, 3)}, "do not fit"),
    ],
)
def test_a_layer_that_cannot_be_run_as_it_is_meant_is_refused(
    tmp_path: Path, config: dict[str, Any], weights: dict[str, Tensor] | None, reason: str
) -> None:
    folder = tiny_models.save_bert(tmp_path / "bert")
    add_module(folder, "Dense", config, weights)

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
    told = [each.breakdown.prefill_ns for each in answers if each.breakdown]
    assert told == [each.device_ns for each in answers]


def test_a_cancelled_sequence_is_not_run(tmp_path: Path) -> None:
    engine = load(tiny_models.save_bert(tmp_path / "bert"))
    engine.cancel(1)

    cancelled, mate = run(engine, sequence(1, "water"), sequence(2, "wheel"))

    assert (cancelled.finish_reason, cancelled.embedding) == (FinishReason.CANCELLED, None)
    assert mate.embedding is not None
