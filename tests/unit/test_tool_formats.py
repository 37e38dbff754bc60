"""Calls of tools as model families write them: read, and held to by a grammar."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.requests.calls import Call
from app.requests.tool_formats import FORMATS, ToolFormat, format_of
from app.requests.tools import Function
from tests.unit import chat_templates

IN_JSON: Final = [each for each in FORMATS if isinstance(each, ToolFormat)]
in_json = pytest.mark.parametrize("form", IN_JSON, ids=lambda form: "+".join(form.signs))
formats = pytest.mark.parametrize("form", FORMATS, ids=lambda form: "+".join(form.signs))

NUMBERS: Final = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
JSON: Final = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda it: st.lists(it, max_size=3) | st.dictionaries(st.text(max_size=5), it, max_size=3),
    max_leaves=5,
)
ARGUMENTS: Final = st.dictionaries(st.text(max_size=6), JSON, max_size=3)
NAMES: Final = st.sampled_from(["grind", "get_weather", "mill-2", "a.b"])
CALLS: Final = st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3)
WORDS: Final = st.text(st.characters(categories=["L", "N", "Zs", "Po"]), max_size=12).map(str.strip)


few = settings(max_examples=30, deadline=None)


def functions(*names: str) -> list[Function]:
    return [Function(name=name) for name in names]


def written(form: ToolFormat, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """As a model writes them."""
    pattern = form.pattern
    texts = [
        pattern.call.replace("NAME", name, 1).replace(
            "ARGUMENTS", json.dumps(arguments, ensure_ascii=False), 1
        )
        for name, arguments in calls
    ]
    return pattern.open + pattern.between.join(texts) + pattern.close


@in_json
@few
@given(calls=CALLS, before=WORDS)
def test_what_is_written_as_calls_is_read_as_these(
    form: ToolFormat, calls: list[tuple[str, dict[str, Any]]], before: str
) -> None:
    before = "" if form.is_bare else before
    text = f"{before}\n{written(form, calls)}\n" if before else written(form, calls)

    content, found = form.read(text, functions(*(name for name, _ in calls)))

    assert content == before
    assert [(each.name, json.loads(each.arguments)) for each in found] == calls


PIECES: Final = st.sampled_from(
    [
        *{mark for form in FORMATS for mark in form.marks},
        *("<function=grind>", "</function>", "<parameter=a>", "</parameter>"),
        *('{"name": "grind", "arguments": {}}', '{"name": "grind", "parameters": {"a": NaN}}'),
        *('{"name": 7, "arguments": {}}', '{"arguments": []}', "[", "]", "{", "}", '"', "```json"),
        *("grind", "functions.", ":0", ";", ",", "\n", " ", "1e999", '{"a": "\\ud800"}', "\\u0000"),
    ]
)


@formats
@few
@given(pieces=st.lists(PIECES | st.text(max_size=4), max_size=12))
def test_whatever_a_model_writes_is_read_and_nothing_that_is_no_call_is_lost(
    form: Any, pieces: list[str]
) -> None:
    text = "".join(pieces)

    content, calls = form.read(text, functions("grind"))

    assert calls or content == text
    for call in calls:
        assert call.name
        assert isinstance(json.loads(call.arguments), dict)
        json.dumps([call.name, call.arguments]).encode()
        assert "\\u0000" not in json.dumps(call.name)


@formats
def test_a_long_answer_of_one_thing_is_read_at_once(form: Any) -> None:
    for piece in (" ", "\n", "{", "[", '{"name": "', "a", '{"a":', '"', "<function=a>"):
        for mark in ("", *form.marks):
            text = mark + piece * (100_000 // len(piece))

            assert form.read(text, functions("a")) == (text, [])
            form.read((mark + piece) * 5_000, functions("a"))


GRIND: Final = [Call("grind", '{"fine": true}')]


@pytest.mark.parametrize(
    ("template", "text", "content", "calls"),
    [
        (
            chat_templates.QWEN,
            "I grind it.\n"
            '<tool_call>\n{"name": "grind", "arguments": {"fine": true}}\n</tool_call>',
            "I grind it.",
            GRIND,
        ),
        (
            chat_templates.QWEN,
            '<tool_call>{"arguments":{"fine":true},"name":"grind"}</tool_call>'
            '<tool_call>{"name": "other", "arguments": "{\\"a\\": 1}"}',
            "",
            [*GRIND, Call("other", '{"a": 1}')],
        ),
        (
            chat_templates.LLAMA,
            '<|python_tag|>{"name": "grind", "parameters": {"fine": true}}',
            "",
            GRIND,
        ),
        (
            chat_templates.LLAMA,
            '{"name": "grind", "parameters": {"fine": true}}; '
            '{"type": "function", "function": {"name": "grind", "parameters": {}}}',
            "",
            [*GRIND, Call("grind", "{}")],
        ),
        (
            chat_templates.MISTRAL,
            '[TOOL_CALLS] [{"name": "grind", "arguments": {"fine": true}, "id": "a1b2c3d4e"}]',
            "",
            GRIND,
        ),
        ("[TOOL_CALLS] and [ARGS]", '[TOOL_CALLS]grind[ARGS]{"fine": true}', "", GRIND),
        (
            "[TOOL_CALLS] and [ARGS]",
            '[TOOL_CALLS]grind[CALL_ID]a1b2c3d4e[ARGS]{"fine": true}[TOOL_CALLS]grind[ARGS]{}',
            "",
            [*GRIND, Call("grind", "{}")],
        ),
        (
            "<｜tool▁call▁begin｜> ```json",
            "Well.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>grind\n"
            '```json\n{"fine": true}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
            "Well.",
            GRIND,
        ),
        (
            "<｜tool▁call▁begin｜>",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>grind<｜tool▁sep｜>"
            '{"fine": true}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
            "",
            GRIND,
        ),
        (
            "<|tool_call_begin|>",
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.grind:0"
            '<|tool_call_argument_begin|>{"fine": true}<|tool_call_end|><|tool_calls_section_end|>',
            "",
            GRIND,
        ),
        (
            "<|START_ACTION|>",
            '<|START_ACTION|>[\n{"tool_call_id": "0", "tool_name": "grind", "parameters": '
            '{"fine": true}}\n]<|END_ACTION|>',
            "",
            GRIND,
        ),
    ],
)
def test_the_formats_of_families_are_told_by_their_templates(
    template: str, text: str, content: str, calls: list[Call]
) -> None:
    form = format_of(template)

    assert form is not None
    assert form.read(text, functions("grind")) == (content, calls)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (chat_templates.LLAMA, '{"name": "Old Mill", "parameters": {"age": 17}}'),
        (chat_templates.LLAMA, 'It is {"name": "grind", "parameters": {}}'),
        (chat_templates.LLAMA, '{"name": "grind", "parameters": {}} and more'),
        (chat_templates.QWEN, '<tool_call>\n{"name": "grind", "arguments": {"fine": tr'),
        (chat_templates.QWEN, "A mill grinds."),
        (chat_templates.MISTRAL, "[TOOL_CALLS]"),
    ],
)
def test_what_only_looks_like_a_call_or_was_cut_off_is_what_was_said(
    template: str, text: str
) -> None:
    form = format_of(template)

    assert form is not None
    assert form.read(text, functions("grind")) == (text, [])


def test_a_template_without_calls_has_no_format() -> None:
    assert format_of(chat_templates.PLAIN) is None
    assert format_of(chat_templates.R1) is None


CODER: Final = "<tool_call> <function=...> <parameter=...>"
GLM: Final = "<tool_call> <arg_key> <arg_value>"
MILL: Final = Function(
    name="grind",
    parameters={
        "type": "object",
        "properties": {
            "grain": {"type": "string"},
            "fine": {"type": "boolean"},
            "stones": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["grain"],
    },  # type: ignore[arg-type]
)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            CODER,
            "Well.\n<tool_call>\n<function=grind>\n<parameter=grain>\n17\n rye\n</parameter>\n"
            "<parameter=fine>\ntrue\n</parameter>\n<parameter=stones>\n[1, 2]\n</parameter>\n"
            "</function>\n</tool_call>",
        ),
        (
            GLM,
            "Well.\n<tool_call>grind\n<arg_key>grain</arg_key>\n<arg_value>17\n rye</arg_value>\n"
            "<arg_key>fine</arg_key>\n<arg_value>true</arg_value>\n"
            "<arg_key>stones</arg_key>\n<arg_value>[1, 2]</arg_value>\n</tool_call>",
        ),
    ],
    ids=["coder", "glm"],
)
def test_arguments_in_tags_are_text_or_json_as_the_functions_schema_says(
    template: str, text: str
) -> None:
    form = format_of(template)
    assert form is not None

    content, calls = form.read(text, [MILL])

    assert content == "Well."
    [(name, arguments)] = [(each.name, json.loads(each.arguments)) for each in calls]
    assert name == "grind"
    assert arguments == {"grain": "17\n rye", "fine": True, "stones": [1, 2]}
    assert form.read(text[:-30], [MILL]) == (text[:-30], [])
