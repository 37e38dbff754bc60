"""Encoders, classifiers and cross-encoders of every family: as transformers has them, in any
company, up to the last token that they take."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoModelForSequenceClassification

from app.config.settings import ModelSettings
from app.engines import registry
from app.engines.base import Engine, Generation, Sequence
from app.engines.encoder.engine import EncoderEngine
from app.engines.registry import create
from app.errors import ConfigError
from app.jobs import Kind, PoolingParams
from tests.unit import tiny_encoders
from tests.unit.tiny_encoders import DECODERS, FAMILIES, MINDS_PADDING
from tests.unit.tiny_models import CONTEXT, save_bert, save_llama

TEXTS = ["a", "water mills", "the old mill by the river turns all day long", "m" * CONTEXT]


def load(folder: Path, kind: Kind = Kind.EMBED, **more: Any) -> Engine:
    settings = ModelSettings(
        source=str(folder),
        kind=kind,
        engine="encoder",
        dtype="float32",
        **{"context_tokens": CONTEXT} | more,
    )
    return create("encoder", folder, settings, device="cpu", threads=1, progress=lambda: None)


def run(engine: Engine, *sequences: Sequence) -> list[Generation]:
    engine.admit("batch", sequences)
    return engine.step()


def sequences() -> list[Sequence]:
    return [Sequence(place, tuple(text.encode())) for place, text in enumerate(TEXTS)]


def alone(model: Any, text: str, **inputs: Any) -> Any:
    with torch.inference_mode():
        # A copy: the encoder of BigBird leaves its sparse attention for good at a short text.
        return copy.deepcopy(model)(torch.tensor([list(text.encode())]), **inputs)


def assert_like(found: list[Any], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(one), other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", [*FAMILIES, *MINDS_PADDING])
def test_an_encoder_gives_the_vectors_of_transformers_in_any_company_up_to_its_limit(
    tmp_path: Path, family: str
) -> None:
    folder = tiny_encoders.save_encoder(tmp_path, family)

    answers = run(load(folder), *sequences())

    model = tiny_encoders.auto_class(family).from_pretrained(folder, dtype=torch.float32)
    hidden = [alone(model, text).last_hidden_state[0].mean(0) for text in TEXTS]
    assert_like([each.embedding for each in answers], [normalize(each, dim=0) for each in hidden])


@pytest.mark.parametrize("family", [*sorted(FAMILIES.keys() - {"t5"}), *MINDS_PADDING, *DECODERS])
def test_a_classifier_gives_the_probabilities_of_transformers_in_any_company(
    tmp_path: Path, family: str
) -> None:
    folder = tiny_encoders.save_classifier(tmp_path, family)

    answers = run(load(folder, Kind.CLASSIFY), *sequences())

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    expected = [alone(model, text).logits[0].softmax(0) for text in TEXTS]
    assert_like([each.scores for each in answers], expected)


@pytest.mark.parametrize(
    "family", [name for name, config in FAMILIES.items() if config.get("pad_token_id") == 1]
)
def test_the_limit_of_positions_behind_the_padding_index_is_known_without_the_model(
    tmp_path: Path, family: str
) -> None:
    folder = tiny_encoders.save_encoder(tmp_path, family)

    found = load(folder, context_tokens=None)

    assert isinstance(found, EncoderEngine)
    assert found._tokenizer.context_tokens == CONTEXT
    with pytest.raises(ConfigError, match=f"the model's context is {CONTEXT} tokens"):
        load(folder, context_tokens=CONTEXT + 1)


def test_a_model_that_does_not_run_its_longest_text_is_refused_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_encoders.save_encoder(tmp_path, "roberta")
    monkeypatch.setattr(
        "app.engines.checkpoint.context.PADDING_HAS_PLACES", frozenset()
    )  # unheard of

    with pytest.raises(ConfigError, match=r"a text of 98 tokens.*set context_tokens to less"):
        load(folder, context_tokens=None)


@pytest.mark.parametrize("family", MINDS_PADDING)
def test_a_model_that_minds_padding_says_that_it_runs_one_length_at_a_time(
    tmp_path: Path, family: str
) -> None:
    found = load(tiny_encoders.save_encoder(tmp_path, family))

    assert "by equal length" in getattr(found, "kernels", "")


def test_a_decoder_without_a_padding_token_classifies_each_text_alone(tmp_path: Path) -> None:
    folder = tiny_encoders.save_classifier(tmp_path, "llama", pad_token_id=None)

    engine = load(folder, Kind.CLASSIFY)
    answers = run(engine, *sequences())

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert "one at a time" in getattr(engine, "kernels", "")
    expected = [alone(model, text).logits[0].softmax(0) for text in TEXTS]
    assert_like([each.scores for each in answers], expected)


@pytest.mark.parametrize("family", ["bert", "roberta", "albert"])
def test_the_checkpoint_of_a_masked_language_model_is_an_embedder(
    tmp_path: Path, family: str
) -> None:
    folder = tiny_encoders.save_encoder(tmp_path, family, masked=True)

    [found] = run(load(folder), sequences()[1])

    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    hidden = alone(model, TEXTS[1]).last_hidden_state[0].mean(0)
    assert_like([found.embedding], [normalize(hidden, dim=0)])


def test_the_two_texts_of_a_pair_are_told_apart_by_their_types(tmp_path: Path) -> None:
    folder = tiny_encoders.save_classifier(tmp_path, labels=1)
    types = (0,) * 6 + (1,) * 5
    pair = Sequence(1, tuple(TEXTS[1].encode()), token_type_ids=types)

    found = run(load(folder, Kind.RERANK), sequences()[2], pair)

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    logits = alone(model, TEXTS[1], token_type_ids=torch.tensor([types])).logits[0]
    assert_like([found[1].scores], [logits.sigmoid()])


@pytest.mark.parametrize(
    ("labels", "config", "activation"),
    [
        (1, {}, torch.sigmoid),
        (3, {"problem_type": "multi_label_classification"}, torch.sigmoid),
        (3, {"problem_type": "single_label_classification"}, lambda it: it.softmax(-1)),
        (1, {"problem_type": "regression"}, lambda it: it),
        (1, {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, None),
        (1, {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, None),
    ],
)
def test_scores_are_activated_as_the_configuration_says_and_raw_when_asked(
    tmp_path: Path, labels: int, config: dict[str, Any], activation: Any
) -> None:
    folder = tiny_encoders.save_classifier(tmp_path, labels=labels, **config)
    raw = Sequence(2, tuple(TEXTS[1].encode()), pooling=PoolingParams(use_activation=False))

    active, given = run(load(folder, Kind.CLASSIFY), sequences()[1], raw)

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    logits = alone(model, TEXTS[1]).logits[0]
    assert_like(
        [active.scores, given.scores], [activation(logits) if activation else logits, logits]
    )


@pytest.mark.parametrize(
    ("config", "kind", "reason"),
    [
        ({}, Kind.EMBED, "BertForSequenceClassification, which is a classifier; set kind classify"),
        ({}, Kind.RERANK, "has 3 classes"),
        ({"sbert_ce_default_activation_function": "os.system"}, Kind.CLASSIFY, "os.system"),
        ({"problem_type": "ranking"}, Kind.CLASSIFY, "problem_type"),
    ],
)
def test_a_classifier_that_would_answer_nonsense_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], kind: Kind, reason: str
) -> None:
    folder = tiny_encoders.save_classifier(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))

    with pytest.raises(ConfigError, match=reason):
        load(folder, kind)


def test_an_encoder_without_a_head_is_no_classifier(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="BertModel, which has no head"):
        load(save_bert(tmp_path), Kind.CLASSIFY)


def test_a_decoder_embeds_only_where_files_say_how(tmp_path: Path) -> None:
    folder = save_llama(tmp_path)
    with pytest.raises(ConfigError, match="LlamaForCausalLM, which generates text"):
        load(folder)
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"pooling_mode_lasttoken": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))

    answers = run(load(folder), *sequences())

    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    hidden = [alone(model, text).last_hidden_state[0, -1] for text in TEXTS]
    assert_like([each.embedding for each in answers], [normalize(each, dim=0) for each in hidden])


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        ("encoder", Kind.GENERATE),
        ("inflight", Kind.EMBED),
        ("generate", Kind.CLASSIFY),
        ("vllm", Kind.RERANK),
    ],
)
def test_an_engine_is_refused_for_models_of_a_kind_that_it_does_not_run(
    engine: str, kind: Kind
) -> None:
    with pytest.raises(ConfigError, match=f"The engine {engine} runs models of kind .* not {kind}"):
        registry.check(ModelSettings(source="x", kind=kind, engine=engine))


def test_an_option_that_the_encoder_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no option weights"):
        load(save_bert(tmp_path), options={"weights": "int8"})
