"""Conversations through chat templates of families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.engines.text.tokenizer import FileTokenizer
from app.errors import InvalidSchema, RequestError
from app.requests.bodies import parse
from tests.unit import chat_templates, tiny_tokenizers
from tests.unit.chats import CALL, TOOL, USER, Make, prepared, shown


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda template, **given: chat_templates.tokenizer_of(tmp_path, template, **given)


def test_parts_of_a_content_are_lines_of_their_own(make: Make) -> None:
    parts = [{"type": "text", "text": "Grind it."}, {"type": "text", "text": "Finely."}]

    text = shown(make(chat_templates.PLAIN), messages=[{"role": "user", "content": parts}])

    assert text == "<|im_start|>user\nGrind it.\nFinely.<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_takes_contents_in_parts_is_given_parts(make: Make) -> None:
    text = shown(make(chat_templates.PARTS))

    assert text == "<|im_start|>user\nGrind it.<|im_end|>\n<|im_start|>assistant\n"


def test_a_developer_is_a_system_to_templates_that_know_no_other(make: Make) -> None:
    messages = [{"role": "developer", "content": "Be short."}, USER]
    knows = chat_templates.PLAIN + "{# developer #}"

    assert "<|im_start|>system\nBe short." in shown(make(chat_templates.PLAIN), messages=messages)
    assert "<|im_start|>developer\nBe short." in shown(make(knows), messages=messages)


def test_tools_calls_and_their_results_are_rendered_as_the_model_knows_them(make: Make) -> None:
    messages = [
        USER,
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": "done"},
    ]

    text = shown(make(chat_templates.QWEN), messages=messages, tools=[TOOL])

    assert json.dumps(TOOL) in text
    assert '<tool_call>\n{"name": "grind", "arguments": {"fine": true}}\n</tool_call>' in text
    assert "<tool_response>\ndone\n</tool_response>" in text


def test_a_result_has_the_name_of_what_was_called(make: Make) -> None:
    template = "{% for m in messages %}{{ m.role }} {{ m.name }};{% endfor %}"
    messages = [
        {"role": "user", "content": "a", "name": "alice"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "a1b2c3d4e", "content": "done"},
    ]

    assert shown(make(template), messages=messages) == "user alice;assistant ;tool grind;"


def test_tools_keep_the_order_of_their_keys_through_the_row(make: Make) -> None:
    schema = {"type": "object", "properties": {"wheel": {}, "age": {}}}
    tool = {"type": "function", "function": {"name": "grind", "parameters": schema}}
    raw = parse({"messages": [USER], "tools": [tool]}).raw

    stored = json.loads(json.dumps(raw, sort_keys=True))  # as jsonb forgets it

    assert '"properties": {"wheel": {}, "age": {}}' in shown(make(chat_templates.QWEN), **stored)


def test_tools_that_are_not_to_be_called_are_not_told(make: Make) -> None:
    qwen = make(chat_templates.QWEN)

    assert shown(qwen, tools=[TOOL], tool_choice="none") == shown(qwen)


def test_a_template_for_tools_is_used_where_there_are_some(make: Make, tmp_path: Path) -> None:
    tokenizer = make(chat_templates.PLAIN)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(chat_templates.QWEN)
    tokenizer = FileTokenizer(tmp_path, tiny_tokenizers.SETTINGS)

    assert "<tools>" in shown(tokenizer, tools=[TOOL])
    assert "<tools>" not in shown(tokenizer)


@pytest.mark.parametrize("said", ["A mill", "A mill ", "", "A mill\n\n", "Well <b>"])
@pytest.mark.parametrize("template", [chat_templates.PLAIN, chat_templates.PARTS])
def test_what_an_assistant_said_last_is_continued_to_the_letter(
    make: Make, template: str, said: str
) -> None:
    messages = [USER, {"role": "assistant", "content": said}]

    text = shown(make(template), messages=messages, continue_final_message=True)

    assert text.endswith(f"<|im_start|>assistant\n{said}")


def test_the_assistants_turn_need_not_be_begun(make: Make) -> None:
    assert shown(make(chat_templates.PLAIN), add_generation_prompt=False).endswith("<|im_end|>\n")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        (
            {
                "messages": [USER, {"role": "assistant", "content": "A"}],
                "continue_final_message": True,
                "add_generation_prompt": True,
            },
            "add_generation_prompt",
        ),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "function", "content": "a"}]}, "messages.0.role"),
        ({"messages": [USER | {"tool_calls": [CALL]}]}, "messages.0.tool_calls"),
        ({"messages": [USER | {"tool_call_id": "a"}]}, "messages.0.tool_call_id"),
        ({"messages": [USER | {"reasoning_content": "a"}]}, "messages.0.reasoning_content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0",
        ),
        (
            {"messages": [USER, {"role": "user", "content": [{"type": "image_url",
             "image_url": {"url": "data:,"}}]}]},
            "messages.1.content.0.type",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {
                "name": "grind", "arguments": "{"}}]}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": "{"}}]},
            "tools.0.function.parameters",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "mill"}}},
            "tool_choice.function.name",
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        (
            {
                "tools": [TOOL],
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "tool_choice",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"bos_token": "a"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"color": "red"}}, "chat_template_kwargs.color"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_go_together_is_refused_by_name(
    make: Make, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as refused:
        prepared(make(chat_templates.QWEN), **fields)

    assert refused.value.param == param


def test_a_schema_of_a_tool_that_is_none_is_an_error_of_the_schema() -> None:
    tool = {"type": "function", "function": {"name": "a", "parameters": "{"}}

    with pytest.raises(InvalidSchema):
        parse({"messages": [USER], "tools": [tool]})


@pytest.mark.parametrize("template", [chat_templates.PLAIN, chat_templates.R1])
def test_tools_are_refused_where_the_template_has_none(make: Make, template: str) -> None:
    with pytest.raises(RequestError, match="has no tools") as refused:
        prepared(make(template), tools=[TOOL])

    assert refused.value.param == "tools"


def test_a_template_that_has_tools_and_no_known_way_to_call_them_is_refused(make: Make) -> None:
    with pytest.raises(RequestError, match="How this model writes calls"):
        prepared(make(chat_templates.PLAIN + "{{ tools }}"), tools=[TOOL])


def test_thinking_is_turned_off_by_a_variable_of_the_template_or_by_effort(make: Make) -> None:
    qwen = make(chat_templates.QWEN)

    off = shown(qwen, chat_template_kwargs={"enable_thinking": False})

    assert off.endswith("<think>\n\n</think>\n\n")
    assert shown(qwen, reasoning_effort="none") == off
    assert shown(qwen, reasoning_effort="low") == shown(qwen)


def test_what_is_off_needs_no_variable_to_be_turned_off_by(make: Make) -> None:
    plain = make(chat_templates.PLAIN)

    assert shown(plain, chat_template_kwargs={"enable_thinking": False}) == shown(plain)
    assert shown(plain, reasoning_effort="none") == shown(plain)


SPOILT: Final = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "<", "|", ">", "im_end", '"', "\\", " ", "a"]),
    min_size=1,
    max_size=6,
).map("".join)


@pytest.fixture(scope="module")
def noting(tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    folder = tmp_path_factory.mktemp("qwen")
    return chat_templates.tokenizer_of(folder, chat_templates.QWEN + "{{ note }}")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=SPOILT)
def test_no_text_of_a_caller_becomes_a_special_token_wherever_it_stands(
    noting: FileTokenizer, text: str
) -> None:
    # given a conversation that says the text in every place for one
    def body(text: str) -> dict[str, Any]:
        schema = {"type": "object", "properties": {text: {"type": "string", "enum": [text]}}}
        function = {"name": "grind", "description": text, "parameters": schema}
        call = CALL | {"function": {"name": "grind", "arguments": json.dumps({text: [text]})}}
        said = {"role": "assistant", "content": text, "reasoning_content": text}
        return {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": text}],
                    "name": ("a" + text)[:64],
                },
                said | {"tool_calls": [call | {"id": text}]},
                {"role": "tool", "tool_call_id": text, "content": text},
            ],
            "tools": [{"type": "function", "function": function}],
            "chat_template_kwargs": {"note": text},
        }

    def marks(text: str) -> list[int]:
        [prompt] = prepared(noting, **body(text)).prompts
        return [each for each in prompt if each in noting.special]

    # when it is rendered, then it has the special tokens of one that says something harmless
    try:
        found = marks(text)
    except RequestError as error:
        assert "cannot be told from them" in str(error)  # noqa: PT017
    else:
        assert found == marks("mill stone")
