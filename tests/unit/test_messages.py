"""Calls of Anthropic's API: what they mean to a model, and how they are answered."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import pytest
from anthropic import types
from hypothesis import given
from hypothesis import strategies as st

from app.config.settings import ModelSettings
from app.engines.base import Generation
from app.engines.text.tokenizer import Tokenizer
from app.errors import RequestError
from app.jobs import FinishReason, Kind
from app.requests import replies
from app.requests.bodies import Request, parse, parse_stored
from app.requests.chat import ChatBody
from app.requests.messages import MessagesBody
from app.requests.prepare import prepare
from tests.unit import chat_templates

USER: Final = {"role": "user", "content": "Is it windy in Vik?"}
TOOL: Final = {"name": "weather", "input_schema": {"type": "object"}}
CALL: Final = {"type": "tool_use", "id": "toolu_a1b2c3d4e", "name": "weather", "input": {"at": 1}}
ANSWER: Final = {"type": "tool_result", "tool_use_id": "toolu_a1b2c3d4e"}
JOB: Final = UUID(int=7)
STUB: Final = ModelSettings(source="stub", kind=Kind.GENERATE, engine="stub")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("qwen")
    return chat_templates.tokenizer_of(folder, chat_templates.QWEN)


def asked(*messages: dict[str, Any], **fields: Any) -> Request:
    body = {"model": "mill", "max_tokens": 64, "messages": list(messages) or [USER]} | fields
    return parse(body, "/v1/messages")


def chat(request: Request) -> ChatBody:
    assert isinstance(request.sent, MessagesBody) and isinstance(request.body, ChatBody)
    return request.body


def told(request: Request) -> list[dict[str, Any]]:
    return [each.model_dump(exclude_unset=True) for each in chat(request).messages]


def test_a_conversation_with_calls_becomes_a_chat() -> None:
    request = asked(
        USER,
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}, CALL]},
        {
            "role": "user",
            "content": [
                ANSWER | {"content": [{"type": "text", "text": "gale"}]},
                {"type": "text", "text": "So?"},
            ],
        },
        system=[{"type": "text", "text": "Be brief."}],
        tools=[TOOL],
    )

    call = {"name": "weather", "arguments": '{"at": 1}'}
    assert told(request) == [
        {"role": "system", "content": "Be brief."},
        USER,
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "a1b2c3d4e", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": "gale"},
        {"role": "user", "content": "So?"},
    ]
    assert [each.name for each in chat(request).offer.functions] == ["weather"]


def test_turns_of_one_speaker_become_one_and_an_assistants_last_goes_on() -> None:
    begun = {"role": "assistant", "content": "A"}
    request = asked(USER, {"role": "user", "content": "Say."}, begun)

    assert [each["role"] for each in told(request)] == ["user", "assistant"]
    assert told(request)[0]["content"] == "Is it windy in Vik?\nSay."
    assert chat(request).continue_final_message


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tool_choice": {"type": "any"}, "tools": [TOOL]}, {"is_required": True}),
        (
            {"tool_choice": {"type": "tool", "name": "weather"}, "tools": [TOOL]},
            {"is_required": True, "is_named": True, "is_many": False},
        ),
        (
            {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}, "tools": [TOOL]},
            {"is_required": False, "is_many": False},
        ),
        ({"tool_choice": {"type": "none"}, "tools": [TOOL]}, {"functions": ()}),
    ],
)
def test_a_choice_of_tools_is_kept(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    offer = chat(asked(**fields)).offer

    assert {name: getattr(offer, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [CALL]}]}, "messages.0.content.0.type"),
        (
            {"messages": [{"role": "assistant", "content": [ANSWER]}]},
            "messages.0.content.0.type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "messages.0.content.0.tool_use_id",
        ),
        (
            {"messages": [{"role": "user", "content": [ANSWER | {"content": [{"type": "text"}]}]}]},
            "messages.0.content.0.content.0.text",
        ),
        ({"messages": [USER, {"role": "assistant", "content": [CALL]}]}, "messages"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "auto", "name": "weather"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences.0"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"frob": 1}, "frob"),
        ({"system": "\ud800"}, "system"),
        ({"messages": [USER | {"content": "a\0b"}]}, "messages.0.content"),
    ],
)
def test_what_is_wrong_is_named_as_the_caller_calls_it(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        asked(**fields)

    assert refused.value.param == param


def test_a_stored_request_is_read_back_as_the_same() -> None:
    first = asked(USER, tools=[TOOL], thinking={"type": "enabled"}, metadata={"user_id": "u"})

    again = parse_stored(json.loads(json.dumps(first.raw)), first.url, 1)

    assert again.raw == first.raw and again.fingerprint == first.fingerprint
    assert again.prompts == first.prompts
    assert first.body.metadata == {"user_id": "u"}  # a label of the job, kept beside its request
    assert again.body.metadata == {}


def answered(
    request: Request,
    tokenizer: Tokenizer,
    text: str,
    reason: FinishReason,
    tokens: str | None = None,
) -> types.Message:
    """The answer when the model has drawn `tokens`, of which `text` was told."""
    prepared = prepare(request, tokenizer, STUB)
    drawn = list(tokenizer.encode_text(tokens or text, parse_special=True))
    generation = Generation(1, reason, drawn, text, input_tokens=9, cached_tokens=4)
    body = replies.body(
        request,
        [generation],
        job_id=str(JOB),
        model="mill",
        created=0,
        tokenizer=tokenizer,
        prompts=prepared.prompts,
    )
    return types.Message.model_validate(body)


def test_an_answer_has_blocks_usage_and_the_jobs_id(tokenizer: Tokenizer) -> None:
    message = answered(asked(), tokenizer, "Windy.", FinishReason.STOP)

    assert message.id == f"msg_{JOB.hex}"
    assert [each.to_dict() for each in message.content] == [{"type": "text", "text": "Windy."}]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (5, 4)


@pytest.mark.parametrize(
    ("reason", "drawn", "expected"),
    [
        (FinishReason.LENGTH, "Windy", ("max_tokens", None)),
        (FinishReason.CANCELLED, "Windy", ("max_tokens", None)),
        (FinishReason.STOP, "Windy END or so", ("stop_sequence", "END")),
        (FinishReason.STOP, "Windy", ("end_turn", None)),
    ],
)
def test_why_an_answer_ended_is_told(
    tokenizer: Tokenizer, reason: FinishReason, drawn: str, expected: tuple[str, str | None]
) -> None:
    request = asked(stop_sequences=["xyz", "END", "ND"])

    message = answered(request, tokenizer, "Windy", reason, drawn)

    assert (message.stop_reason, message.stop_sequence) == expected


def test_calls_and_thoughts_become_blocks(tokenizer: Tokenizer) -> None:
    called = '<tool_call>\n{"name": "weather", "arguments": {"at": 1}}\n</tool_call>'
    text = f"<think>Hm.</think>Look.{called}"

    message = answered(
        asked(tools=[TOOL], thinking={"type": "enabled"}), tokenizer, text, FinishReason.STOP
    )
    unseen = answered(asked(tools=[TOOL]), tokenizer, text, FinishReason.STOP)

    assert [each.type for each in message.content] == ["thinking", "text", "tool_use"]
    call = message.content[2]
    assert call.type == "tool_use" and call.input == {"at": 1} and call.id.startswith("toolu_")
    assert message.stop_reason == "tool_use"
    assert [each.type for each in unseen.content] == ["text", "tool_use"]


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.sampled_from([CALL, ANSWER]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "content", "source", "role", "name", "input", "id"]),
            inner,
        )
    ),
    max_leaves=12,
)


@given(
    fields=st.dictionaries(
        st.sampled_from([*MessagesBody.model_fields]), json_values, min_size=1, max_size=3
    )
)
def test_any_value_is_taken_or_refused(fields: dict[str, Any]) -> None:
    with suppress(RequestError):
        assert asked(**fields).prompts
