"""What models are tried with: prompts as they are, and nothing that is left to chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.config.settings import ModelSettings
from app.engines.catalog import CatalogModel
from app.engines.checkpoint.card import load_card
from app.engines.text.tokenizer import load_tokenizer
from app.errors import RequestError
from app.jobs import Kind
from app.trials.questions import Asked, Question, ask, built_in
from tests.unit.tiny_encoders import save_classifier
from tests.unit.tiny_models import save_bert, save_llama


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("questions")
    return {
        "generate": save_llama(folder / "llama"),
        "embed": save_bert(folder / "bert"),
        "classify": save_classifier(folder / "classes"),
        "rerank": save_classifier(folder / "score", labels=1),
    }


def model_of(folders: dict[str, Path], kind: str, **fields: Any) -> CatalogModel:
    engine = "inflight" if kind == "generate" else "encoder"
    given = {"source": "tiny", "kind": kind, "engine": engine, **fields}
    settings = ModelSettings.model_validate(given, strict=False)
    folder = folders[kind]
    tokenizer = load_tokenizer(folder, settings)
    return CatalogModel(settings, folder, tokenizer, load_card(folder, settings))


def asked(model: CatalogModel, *given: str | dict[str, Any], tokens: int = 8) -> list[Asked]:
    return ask([Question("line 1", each) for each in given], model, tokens)


@pytest.mark.parametrize("kind", ["generate", "embed", "classify"])
def test_there_are_prompts_for_every_kind_of_model(folders: dict[str, Path], kind: str) -> None:
    model = model_of(folders, kind)

    found = [ask([each], model, 4) for each in built_in(Kind(kind)) if len(str(each.given)) < 60]

    assert len(found) > 3
    assert all(each.tokens for prompts in found for each in prompts)


def test_draws_and_formats_of_a_request_are_left_aside(folders: dict[str, Path]) -> None:
    # given a request that draws, is to stop somewhere, and asks for a schema and numbers
    model = model_of(folders, "generate")
    body = {"messages": [{"role": "user", "content": "mills"}]}
    drawn = {
        "temperature": 1.7,
        "seed": 4,
        "n": 3,
        "stop": ["x"],
        "logprobs": True,
        "top_logprobs": 2,
        "max_completion_tokens": 5,
        "logit_bias": {"3": 5},
        "response_format": {"type": "json_object"},
        "model": "another",
    }

    [plain], [found] = asked(model, body), asked(model, body | drawn)

    assert plain.tokens == found.tokens == asked(model, "mills")[0].tokens
    assert plain.params is not None
    assert found.params is not None
    assert (plain.params.max_tokens, found.params.max_tokens) == (8, 5)
    for params in (plain.params, found.params):
        assert (params.temperature, params.num_beams, params.stop) == (0, 1, ())
        assert (params.grammar, params.seed, params.logprobs, params.logit_bias) == (
            *(None, None, None, ()),
        )


def test_a_prompt_that_fills_the_context_has_the_room_that_is_left(
    folders: dict[str, Path],
) -> None:
    model = model_of(folders, "generate")
    context = model.tokenizer.context_tokens
    prompt = [5] * (context - 3)

    [found] = asked(model, {"prompt": prompt})

    assert found.params is not None
    assert found.params.max_tokens == 3
    with pytest.raises(RequestError, match=r"line 1 \(prompt\): The prompt has"):
        asked(model, {"prompt": prompt, "max_tokens": 4})


def test_a_request_of_many_prompts_is_many_prompts_whatever_the_models_batches_are(
    folders: dict[str, Path],
) -> None:
    model = model_of(folders, "embed", max_batch_size=2)

    found = asked(model, {"input": ["a", "b", "c"]}, "d")

    assert [each.request for each in found] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("kind", "given", "told"),
    [
        ("generate", {"input": "a"}, "This is a request to /v1/embeddings"),
        ("embed", {"prompt": "a"}, "This is a request to /v1/completions"),
        ("generate", {}, "Give exactly one of messages, prompt"),
        ("generate", {"prompt": "a", "max_tokens": "many"}, "max_tokens"),
        ("generate", {"prompt": "a", "max_tokens": 10**6}, "This model gives at most"),
        ("generate", {"prompt": [10**6]}, "A token id is out of range"),
        ("rerank", "a text", "A reranker needs a query and documents"),
        ("classify", "m" * 5000, "The prompt has"),
    ],
)
def test_what_a_model_does_not_take_is_told_with_its_line(
    folders: dict[str, Path], kind: str, given: str | dict[str, Any], told: str
) -> None:
    with pytest.raises(RequestError) as error:
        asked(model_of(folders, kind), given)

    assert str(error.value).startswith("line 1")
    assert told in str(error.value)


def test_an_input_is_meant_for_the_model_at_hand(folders: dict[str, Path]) -> None:
    for kind in ("embed", "classify"):
        assert asked(model_of(folders, kind), {"input": "a"}) == asked(model_of(folders, kind), "a")
