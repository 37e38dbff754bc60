"""Classification, rerank, score and embeddings end to end: API, Redis, a worker with real (tiny)
models, and the tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from celery import Celery
from transformers import AutoModelForSequenceClassification

from app.cli.results import answers
from app.config.settings import Settings
from gristmill_client import Client
from tests.integration.tiny_system import System, running_system
from tests.unit import tiny_encoders, tiny_models
from tests.unit.tiny_models import BOS, EOS
from tests.waiting import eventually
from tests.workers import results, rows

LABELS = {"id2label": {"0": "dry", "1": "wet", "2": "stone"}}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A classifier, a cross-encoder and an embedder, by kind."""
    return {
        "classify": tiny_encoders.save_classifier(tmp_path / "sorter", "distilbert", **LABELS),
        "rerank": tiny_encoders.save_classifier(tmp_path / "judge", "bert", labels=1),
        "embed": tiny_models.save_bert(tmp_path / "embedder"),
    }


@pytest.fixture
def config(
    make_settings: Callable[..., Settings],
    folders: dict[str, Path],
    database_url: str,
    redis_url: str,
) -> Settings:
    models = {
        folder.name: {
            "source": str(folder),
            "kind": kind,
            "engine": "encoder",
            "dtype": "float32",
            "default": True,
            "max_wait_ms": 20,
            "options": {"matryoshka": True} if kind == "embed" else {},
        }
        for kind, folder in folders.items()
    }
    return make_settings(database={"url": database_url}, broker={"url": redis_url}, models=models)


@pytest.fixture
def system(config: Settings, folders: dict[str, Path], tmp_path: Path) -> Iterator[System]:
    with running_system(config, folders, tmp_path / "worker") as running:
        yield running


def ids(text: str) -> list[int]:
    """Of a tiny model that puts <bos> before and <eos> behind."""
    alphabet = sorted(tiny_models.pre_tokenizers.ByteLevel.alphabet())
    return [alphabet.index(letter) for letter in text.replace(" ", "Ġ")]


def test_classes_ranks_scores_and_vectors_come_from_the_api_and_are_on_the_books(
    system: System, producer: Celery
) -> None:
    texts = ["The wheel turns.", "Dust"]
    sorter, judge = (
        AutoModelForSequenceClassification.from_pretrained(system.folders[kind]).float()
        for kind in ("classify", "rerank")
    )

    # when texts are classified, by url and by the model alone
    by_url = system.answer({"input": texts}, url="/classify")
    by_model = system.answer({"model": "sorter", "input": texts[0]})

    # then they have the probabilities of transformers, by label
    for text, item in zip(texts, by_url["response"]["data"], strict=True):
        with torch.inference_mode():
            logits = sorter(torch.tensor([[BOS, *ids(text), EOS]])).logits[0]
        expected = dict(zip(LABELS["id2label"].values(), logits.softmax(0).tolist(), strict=True))
        assert item["scores"] == pytest.approx(expected, abs=1e-5)
        assert item["label"] == max(expected, key=lambda label: expected[label])
    assert (by_url["kind"], by_url["url"], by_url["model"]) == (
        "classify",
        "/v1/classify",
        "sorter",
    )
    [item] = by_model["response"]["data"]
    assert item["scores"] == pytest.approx(by_url["response"]["data"][0]["scores"], abs=1e-5)

    # when documents are ranked and pairs scored
    documents = ["Water.", {"text": "A stone"}, "Meal and flour"]
    body = {"query": "mill", "documents": documents, "top_n": 2, "return_documents": True}
    ranked = system.answer(body)
    told = ["Water.", "A stone", "Meal and flour"]
    scored = system.answer({"text_1": "mill", "text_2": told})

    # then each pair has the score that the cross-encoder gives it
    pairs = []
    for text in told:
        tokens = [BOS, *ids("mill"), EOS, *ids(text), EOS]
        types = [int(place >= len("<mill>")) for place in range(len(tokens))]
        with torch.inference_mode():
            given = judge(torch.tensor([tokens]), token_type_ids=torch.tensor([types])).logits[0]
        pairs.append(given.sigmoid().item())
    scores = [item["score"] for item in scored["response"]["data"]]
    assert scores == pytest.approx(pairs, abs=1e-5)
    best = sorted(range(3), key=lambda place: -pairs[place])[:2]
    assert [item["index"] for item in ranked["response"]["results"]] == best
    assert ranked["response"]["results"][0]["document"] == {"text": told[best[0]]}
    assert (ranked["kind"], ranked["url"], scored["url"]) == ("rerank", "/v1/rerank", "/v1/score")

    # when a vector is asked for short and as it is
    whole, short = (
        system.answer({"input": "water", "normalize": False} | more)["response"]
        for more in ({}, {"dimensions": 4})
    )
    assert short["data"][0]["embedding"] == whole["data"][0]["embedding"][:4]

    # when a foreign Celery app sends the same, to tasks of their own
    sent = {
        producer.send_task(f"inference.{task}", kwargs=body).id: kind
        for task, kind, body in (
            ("classify", "classify", {"input": texts}),
            ("rerank", "rerank", body),
            ("score", "rerank", {"text_1": "mill", "text_2": "water"}),
        )
    }
    eventually(lambda: sent.keys() <= results(system.settings).keys(), 60)

    # then all is on the books: kind, tokens, device time and cost
    found = results(system.settings)
    assert {job_id: found[job_id]["kind"] for job_id in sent} == sent
    for row in found.values():
        assert row["state"] == "completed"
        assert row["input_tokens"] > 0 and row["output_tokens"] == 0
        assert row["cost"] > 0
    batches = rows(system.settings, "SELECT kind, device_ns FROM batches")
    assert {batch["kind"] for batch in batches} == {"classify", "rerank", "embed"}
    charged = sum(row["device_ns"] for row in found.values())
    assert charged == sum(batch["device_ns"] for batch in batches)

    # and the model's card and the client tell of them
    models = {each["id"]: each for each in system.api.get("/v1/models").json()["data"]}
    assert models["sorter"]["labels"] == list(LABELS["id2label"].values())
    with Client(str(system.api.base_url)) as client:
        job_id = client.submit({"input": "water"}, url="/v1/classify")
        [said] = answers(client.result(job_id))
    assert json.dumps(said).startswith('{"dry":')
