"""Packed texts: each has the answer that the plain model gives it alone, whatever its company."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import AutoModel, AutoModelForSequenceClassification

from app.config.settings import ModelSettings
from app.engines.base import Engine, Generation, Sequence
from app.engines.encoder import packing
from app.engines.inflight import library
from app.engines.inflight.library import products
from app.engines.registry import create
from app.jobs import FinishReason, Kind, PoolingParams
from tests.unit import tiny_encoders, tiny_models

LONGEST: Final = 400
"""Tokens: several spans of the kernel, and more than any window."""

_HEADS: Final[dict[str, Any]] = {
    "hidden_size": 128,
    "head_dim": 32,
    "max_position_embeddings": LONGEST,
}
_BEHIND_PADDING: Final = _HEADS | {"max_position_embeddings": LONGEST + 2}
WHOLE: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    **{name: (name, _HEADS) for name in ("bert", "electra", "ernie", "megatron-bert")},
    **{name: (name, _BEHIND_PADDING) for name in ("roberta", "xlm-roberta", "camembert")},
    **{name: (name, _BEHIND_PADDING) for name in ("data2vec-text", "mpnet")},
    "distilbert": ("distilbert", _HEADS | {"dim": 128}),
    "modernbert": ("modernbert", _HEADS | {"num_hidden_layers": 4}),  # the first sees all
    "eurobert": ("eurobert", _HEADS | {"num_key_value_heads": 2}),
    "nomic_bert": ("nomic_bert", _HEADS),
    "bert with relu": ("bert", _HEADS | {"hidden_act": "relu"}),
    "bert with silu": ("bert", _HEADS | {"hidden_act": "silu"}),
    "roberta with tanh": ("roberta", _BEHIND_PADDING | {"hidden_act": "gelu_pytorch_tanh"}),
}
"""By name: a family and its configuration, where whole layers are our kernel's, if it multiplies:
else only attention is."""
OWN_ATTENTION: Final = dict.fromkeys(("megatron-bert", "mpnet"))
"""Those of them that leave attention to nobody."""
ATTENTION: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "albert": ("albert", _HEADS),
    "bert of an unknown activation": ("bert", _HEADS | {"hidden_act": "relu2"}),
    "bert of odd sizes": ("bert", _HEADS | {"intermediate_size": 72}),
}
"""The same where only attention is."""
PADDED: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "longformer": ("longformer", _BEHIND_PADDING),
    "deberta": ("deberta", _HEADS),
    "deberta-v2": ("deberta-v2", _HEADS),
    "t5": ("t5", {"d_model": 64, "d_kv": 16, "max_position_embeddings": LONGEST}),
    "xlnet": ("xlnet", _HEADS | {"d_model": 128}),
    "bert with heads of 8": ("bert", {"max_position_embeddings": LONGEST}),
}
"""Those that are not packed."""
ALL: Final = WHOLE | ATTENTION | PADDED

lengths = st.lists(st.integers(1, LONGEST), min_size=1, max_size=9)


def text(length: int, start: int = 0) -> tuple[int, ...]:
    return tuple(5 + (31 * place * place + 7 * place + start) % 240 for place in range(length))


def sequences(counts: list[int], **more: Any) -> list[Sequence]:
    return [Sequence(place, text(count, place), **more) for place, count in enumerate(counts)]


def load(folder: Path, dtype: str = "float32", kind: Kind = Kind.EMBED) -> Engine:
    settings = ModelSettings(
        source=str(folder),
        kind=kind,
        engine="encoder",
        dtype=dtype,
        context_tokens=LONGEST,
    )
    return create("encoder", folder, settings, device="cpu", threads=2, progress=lambda: None)


def run(engine: Engine, given: list[Sequence]) -> list[Generation]:
    engine.admit("batch", given)
    return engine.step()


def vectors(engine: Engine, given: list[Sequence]) -> Tensor:
    return torch.tensor([each.embedding for each in run(engine, given)])


@functools.cache
def held(name: str) -> tuple[Engine, Any, Path]:
    """An engine in float32, transformers' model, and their folder, made once."""
    folder = Path(tempfile.mkdtemp())
    family, config = ALL[name]
    tiny_encoders.save_encoder(folder, family, **config)
    model = tiny_encoders.auto_class(family).from_pretrained(folder, dtype=torch.float32)
    return load(folder), model, folder


def plain(model: Any, given: list[Sequence]) -> Tensor:
    """The mean of each text's token vectors alone, of length 1."""
    with torch.inference_mode():
        found = [model(torch.tensor([each.prompt_token_ids])).last_hidden_state for each in given]
    return normalize(torch.stack([each[0].mean(0) for each in found]), dim=-1)


@pytest.mark.parametrize("name", ALL)
def test_a_text_has_the_plain_model_s_vector_alone_and_in_any_company(name: str) -> None:
    engine, model, _ = held(name)
    texts = sequences([1, 2, 16, 17, 33, 64, 130, 260, LONGEST])

    together = vectors(engine, texts)
    alone = torch.cat([vectors(engine, [each]) for each in texts])

    wanted = plain(model, texts)
    torch.testing.assert_close(together, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["bert", "mpnet", "modernbert"])
@given(counts=lengths, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=8)
def test_whatever_lengths_keep_each_other_company_nobody_s_vector_moves(
    name: str, counts: list[int], seed: int
) -> None:
    engine, model, _ = held(name)
    texts = [Sequence(place, text(n, seed + place)) for place, n in enumerate(counts)]

    found = vectors(engine, texts)

    torch.testing.assert_close(found, plain(model, texts), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", WHOLE)
def test_in_bfloat16_vectors_point_where_those_in_float32_do(name: str) -> None:
    _, model, folder = held(name)
    texts = sequences([1, 7, 40, 133])

    found = vectors(load(folder, "bfloat16"), texts)

    # Random weights of this size shake more than trained ones: transformers' own tell how much.
    wanted = plain(model, texts)
    theirs = plain(copy.deepcopy(model).bfloat16(), texts).float()
    moved = 1 - cosine_similarity(found, wanted)
    assert (moved <= 1e-4 + 1.5 * (1 - cosine_similarity(theirs, wanted)).max()).all()
    assert moved.max() < 0.01


@pytest.mark.parametrize("name", ALL)
def test_how_a_model_is_run_is_said_and_why_it_is_not_packed(name: str) -> None:
    engine, _, _ = held(name)

    said = getattr(engine, "kernels", "")

    if name in WHOLE and products():
        assert "whole layers of packed texts" in said
    elif name in PADDED | OWN_ATTENTION:
        assert "padded batches; not packed: " in said
    else:
        assert "attention of packed texts" in said


def test_packed_texts_are_counted_without_padding() -> None:
    engine, _, _ = held("bert")
    engine.take_stats()

    run(engine, sequences([3, 100, 200]))

    [stats] = engine.take_stats()
    assert (stats.rows, stats.useful_tokens, stats.padded_tokens) == (3, 303, 303)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert", "albert"])
def test_a_packed_classifier_gives_the_probabilities_of_transformers(
    tmp_path: Path, family: str
) -> None:
    folder = tiny_encoders.save_classifier(tmp_path, family, **ALL[family][1])
    texts = sequences([5, 77, 300, 12])

    engine = load(folder, kind=Kind.CLASSIFY)
    found = torch.tensor([each.scores for each in run(engine, texts)])

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = [model(torch.tensor([each.prompt_token_ids])).logits[0] for each in texts]
    assert "packed texts" in getattr(engine, "kernels", "")
    torch.testing.assert_close(found, torch.stack(logits).softmax(-1), atol=1e-5, rtol=0)


def test_the_two_texts_of_a_packed_pair_are_told_apart_by_their_types(tmp_path: Path) -> None:
    folder = tiny_encoders.save_classifier(tmp_path, labels=1, **_HEADS)
    types = (0,) * 20 + (1,) * 21
    pairs = [Sequence(0, text(41), token_type_ids=types), Sequence(1, text(41))]

    engine = load(folder, kind=Kind.RERANK)
    found = torch.tensor([each.scores for each in run(engine, [*pairs, *sequences([3])])])

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        ids = torch.tensor([text(41)] * 2)
        logits = model(ids, token_type_ids=torch.tensor([types, (0,) * 41])).logits
    torch.testing.assert_close(found[:2], logits.sigmoid(), atol=1e-5, rtol=0)
    assert (found[0] - found[1]).abs() > 1e-4


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_packed_tokens_of_a_decoder_see_none_that_come_later(tmp_path: Path, kind: str) -> None:
    folder = tiny_encoders.save_classifier(tmp_path, kind, **_HEADS)
    texts = sequences([5, 77, 300, 12])

    engine = load(folder, kind=Kind.CLASSIFY)
    found = torch.tensor([each.scores for each in run(engine, texts)])

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = [model(torch.tensor([each.prompt_token_ids])).logits[0] for each in texts]
    assert "attention of packed texts" in getattr(engine, "kernels", "")
    torch.testing.assert_close(found, torch.stack(logits).softmax(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["cls_token", "lasttoken", "max_tokens", "weightedmean_tokens"])
def test_packed_texts_are_pooled_as_texts_alone(tmp_path: Path, pooling: str) -> None:
    _, _, bert = held("bert")
    for file in bert.iterdir():
        (tmp_path / file.name).symlink_to(file)
    tiny_models.save_pooling(tmp_path, pooling)
    texts = sequences([3, 90, 41], pooling=PoolingParams(skip=2))
    engine = load(tmp_path)

    together = vectors(engine, texts)

    alone = torch.cat([vectors(engine, [each]) for each in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_that_is_no_number_fails_alone_and_leaves_nothing_behind(
    tmp_path: Path, dtype: str
) -> None:
    # given a model of which one token is NaN
    folder = tiny_encoders.save_encoder(tmp_path, "bert", **_HEADS)
    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32)
    model.embeddings.word_embeddings.weight.data[ord("!")] = float("nan")
    model.save_pretrained(folder)
    engine = load(folder, dtype)
    bad = Sequence(9, tuple(b"!" * 61))
    good = [Sequence(place, tuple(b"water mill" * n)) for place, n in enumerate((1, 5, 9))]
    before = vectors(engine, good)

    # when
    answers = run(engine, [bad, *good])
    after = vectors(engine, good)

    # then
    assert [each.error_code for each in answers] == ["not_finite", None, None, None]
    assert {each.finish_reason for each in answers[1:]} == {FinishReason.STOP}
    torch.testing.assert_close(torch.tensor([each.embedding for each in answers[1:]]), before)
    assert torch.equal(after, before)


def test_where_there_are_no_kernels_texts_are_padded_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model, folder = held("bert")
    monkeypatch.setattr(library, "built", lambda: library.Built(None, "torch alone"))
    texts = sequences([3, 90, 41])

    engine = load(folder)

    assert "padded batches; not packed: no kernel" in getattr(engine, "kernels", "")
    torch.testing.assert_close(vectors(engine, texts), plain(model, texts), atol=1e-5, rtol=0)


def test_a_model_that_packing_would_change_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a kernel that is read wrongly
    _, model, folder = held("bert")
    texts = sequences([3, 90, 41])
    monkeypatch.setattr(packing.Company, "pack", lambda self, given: given)

    engine = load(folder)

    assert "padded batches; not packed: " in getattr(engine, "kernels", "")
    torch.testing.assert_close(vectors(engine, texts), plain(model, texts), atol=1e-5, rtol=0)
