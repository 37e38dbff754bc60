"""Calls of tools as model families write them: read, and held to by a grammar."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.requests.tool_formats import FORMATS, Call, ToolFormat, format_of
from tests.unit import chat_templates

IDS: Final = [each.signs[0] + ("" if len(each.signs) == 1 else "+") for each in FORMATS]
formats = pytest.mark.parametrize("form", FORMATS, ids=IDS)

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


@formats
@given(calls=CALLS, before=WORDS)
def test_what_is_written_as_calls_is_read_as_these(
    form: ToolFormat, calls: list[tuple[str, dict[str, Any]]], before: str
) -> None:
    before = "" if form.is_bare else before
    text = f"{before}\n{written(form, calls)}\n" if before else written(form, calls)

    content, found = form.read(text, {name for name, _ in calls})

    assert content == before
    assert [(each.name, json.loads(each.arguments)) for each in found] == calls


PIECES: Final = st.sampled_from(
    [
        *{mark for form in FORMATS for mark in form.marks},
        *('{"name": "grind", "arguments": {}}', '{"name": "grind", "parameters": {"a": NaN}}'),
        *('{"name": 7, "arguments": {}}', '{"arguments": []}', "[", "]", "{", "}", '"', "```json"),
        *("grind", "functions.", ":0", ";", ",", "\n", " ", "1e999", '{"a": "\\ud800"}', "\\u0000"),
    ]
)


@formats
@given(pieces=st.lists(PIECES | st.text(max_size=4), max_size=12))
def test_whatever_a_model_writes_is_read_and_nothing_that_is_no_call_is_lost(
    form: ToolFormat, pieces: list[str]
) -> None:
    text = "".join(pieces)

    content, calls = form.read(text, {"grind"})

    assert calls or content == text
    for call in calls:
        assert call.name
        assert isinstance(json.loads(call.arguments), dict)
        json.dumps([call.name, call.arguments]).encode()
        assert "\\u0000" not in json.dumps(call.name)


@pytest.mark.timeout(30)
@formats
@pytest.mark.parametrize("piece", [" ", "\n", "{", "[", '{"name": "', "a", '{"a":', '"'])
def test_a_long_answer_of_one_thing_is_read_at_once(form: ToolFormat, piece: str) -> None:
    for mark in ("", *form.marks):
        text = mark + piece * (200_000 // len(piece))

        assert form.read(text, {"a"}) == (text, [])
        form.read((mark + piece) * 20_000, {"a"})


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
    assert form.read(text, {"grind"}) == (content, calls)


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
    assert form.read(text, {"grind"}) == (text, [])


def test_a_template_without_calls_has_no_format() -> None:
    assert format_of(chat_templates.PLAIN) is None
    assert format_of(chat_templates.R1) is None
