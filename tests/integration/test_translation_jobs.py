"""Translation end to end: API, Redis, a worker with real (tiny) translators, and the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from celery import Celery
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, MarianTokenizer

from app.cli.results import answers
from app.config.settings import Settings
from tests.integration.tiny_system import System, running_system
from tests.unit import tiny_translators
from tests.unit.tiny_translators import ENGLISH
from tests.waiting import eventually
from tests.workers import results, rows

pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")


def refusal(system: System, body: dict[str, Any]) -> tuple[str, str]:
    """The field that is refused, and why."""
    told = system.api.post("/v1/jobs", json={"body": body})
    assert told.status_code in (400, 422), told.text
    return told.json()["param"], told.json()["detail"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Marian of one pair, as its authors' folders are, and an NLLB."""
    folder = tmp_path_factory.mktemp("translators")
    return {
        "marian": tiny_translators.save_marian(folder / "marian"),
        "nllb": tiny_translators.save_nllb(folder / "nllb"),
    }


@pytest.fixture
def config(
    make_settings: Callable[..., Settings],
    folders: dict[str, Path],
    database_url: str,
    redis_url: str,
) -> Settings:
    models = {
        name: {
            "source": str(folder),
            "kind": "translate",
            "engine": "generate",
            "dtype": "float32",
            "default": name == "marian",
            "default_max_tokens": 20,
            "max_wait_ms": 20,
        }
        for name, folder in folders.items()
    }
    return make_settings(database={"url": database_url}, broker={"url": redis_url}, models=models)


@pytest.fixture
def system(config: Settings, folders: dict[str, Path], tmp_path: Path) -> Iterator[System]:
    with running_system(config, folders, tmp_path / "worker") as running:
        yield running


def expected(folder: Path, text: str, languages: tuple[str, str] | None = None, **how: Any) -> Any:
    """Texts that transformers gives for a source alone, and their tokens in all."""
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    if languages:
        source, target = languages
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, src_lang=source)
        how["forced_bos_token_id"] = tokenizer.convert_tokens_to_ids(target)
    else:
        tokenizer = MarianTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    outs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, **how)
    lengths = [len([each for each in out[1:] if each != model.config.pad_token_id]) for out in outs]
    return tokenizer.batch_decode(outs, skip_special_tokens=True), sum(lengths)


def texts_of(response: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in response["choices"]]


def test_translations_come_from_the_api_and_from_celery_as_transformers_gives_them(
    system: System, producer: Celery
) -> None:
    marian, nllb = system.folders["marian"], system.folders["nllb"]

    # when a text is translated by the default model, which searches with four beams of its own
    job = system.answer({"input": ENGLISH[0], "source_language": "en", "target_language": "de"})

    # then the answer is transformers' own, with its tokens
    [text], num_tokens = expected(marian, ENGLISH[0], num_beams=4)
    assert texts_of(job["response"]) == [text] == [*answers(job["response"])]
    assert job["response"]["object"] == "translation"
    assert job["response"]["usage"]["completion_tokens"] == num_tokens
    assert (job["kind"], job["url"], job["model"]) == ("translate", "/v1/translations", "marian")

    # when several texts go the same way, with two answers each
    several = system.answer({"input": ENGLISH[:3], "num_beams": 3, "n": 2}, url="/v1/translations")[
        "response"
    ]

    # then each has the two best ends of its search, and the sources are counted once
    alone = [expected(marian, it, num_beams=3, num_return_sequences=2) for it in ENGLISH[:3]]
    assert texts_of(several) == [text for texts, _ in alone for text in texts]
    assert several["usage"]["completion_tokens"] == sum(tokens for _, tokens in alone)
    sources = MarianTokenizer.from_pretrained(marian)(ENGLISH[:3]).input_ids
    assert several["usage"]["prompt_tokens"] == sum(map(len, sources))

    # when a foreign Celery app sends texts of several languages to a model that knows many
    directions = [("deu_Latn", "fra_Latn"), ("eng_Latn", "deu_Latn"), ("fra", "eng")]
    sent = {
        producer.send_task(
            "inference.translate",
            kwargs={
                "model": "nllb",
                "input": ENGLISH[place],
                "source_language": source,
                "target_language": target,
            },
        ).id: place
        for place, (source, target) in enumerate(directions)
    }
    eventually(lambda: sent.keys() <= results(system.settings).keys(), 60)

    # then each is translated from and into its own
    found = results(system.settings)
    for job_id, place in sent.items():
        source, target = (f"{it[:3]}_Latn" for it in directions[place])
        said, _ = expected(nllb, ENGLISH[place], (source, target))
        assert texts_of(found[job_id]["response"]) == said

    # and all is on the books
    batches = rows(system.settings, "SELECT kind, device_ns FROM batches")
    assert {batch["kind"] for batch in batches} == {"translate"}
    assert sum(row["device_ns"] for row in found.values()) == sum(
        batch["device_ns"] for batch in batches
    )
    assert all(row["cost"] > 0 for row in found.values())

    # and what no model can do is said before it is queued
    assert refusal(system, {"input": "x", "target_language": "fr"}) == (
        "body.target_language",
        "This model's target_language is de.",
    )
    param, says = refusal(system, {"model": "nllb", "input": "x", "target_language": "klingon"})
    assert param == "body.target_language"
    assert "no language so called" in says
    models = {each["id"]: each for each in system.api.get("/v1/models").json()["data"]}
    assert models["marian"]["languages"] == ["de"]
    assert "fra_Latn" in models["nllb"]["languages"]
