"""Answers told in their parts, and held to calls, formats and thoughts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from app.engines.sampling.grammar import Grammars, check
from app.engines.text.tokenizer import FileTokenizer
from app.errors import InvalidSchema
from app.jobs import Grammar
from app.requests.tool_formats import ToolFormat, format_of
from tests.unit import chat_templates
from tests.unit.chats import TOOL, USER, Make, answered, prepared, shown
from tests.unit.test_tool_formats import in_json, written


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda template, **given: chat_templates.tokenizer_of(tmp_path, template, **given)


# ── what an answer says ─────────────────────────────────────────────────────────────────────────

CALLED: Final = '<tool_call>\n{"name": "grind", "arguments": {"fine": true}}\n</tool_call>'


@pytest.mark.parametrize("special", [(), ("<tool_call>", "</tool_call>", "<think>", "</think>")])
def test_calls_and_thoughts_are_told_apart_from_what_is_said(
    make: Make, special: tuple[str, ...]
) -> None:
    qwen = make(chat_templates.QWEN, special=special)
    text = f"<think>\nFine flour.\n</think>\n\nI do.\n{CALLED}\n{CALLED}<|im_end|>"

    choice = answered(qwen, text, tools=[TOOL])

    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (message["content"], message["reasoning_content"]) == ("I do.", "Fine flour.")
    assert [it["function"] for it in message["tool_calls"]] == [
        {"name": "grind", "arguments": '{"fine": true}'}
    ] * 2
    ids = [it["id"] for it in message["tool_calls"]]
    assert len({*ids}) == 2
    assert all(len(each) == 9 and each.isalnum() for each in ids)


def test_an_answer_sent_back_is_a_message_like_any_other(make: Make) -> None:
    for template, said in [
        (chat_templates.QWEN, f"<think>\nFine.\n</think>\n\n{CALLED}"),
        (chat_templates.QWEN, "A mill."),
        (chat_templates.QWEN, ""),
        (chat_templates.MISTRAL, '[TOOL_CALLS] [{"name": "grind", "arguments": {"fine": true}}]'),
        (chat_templates.LLAMA, '{"name": "grind", "parameters": {"fine": true}}'),
    ]:
        # given an answer of ours, with what others add to theirs
        tokenizer = make(template, special=("[TOOL_CALLS]",))
        message = answered(tokenizer, said, tools=[TOOL])["message"]
        message |= {"annotations": [], "audio": None, "function_call": None}

        # when it is sent back, with the results of its calls
        results = [
            {"role": "tool", "tool_call_id": it["id"], "content": ""}
            for it in message.get("tool_calls", [])
        ]
        text = shown(tokenizer, messages=[USER, message, *results, USER], tools=[TOOL])

        # then it is rendered as it was written
        assert said.strip().removeprefix("[TOOL_CALLS] [").split('"id"')[0].rstrip("}]") in text


def test_only_the_first_call_is_told_where_several_are_not_wanted(make: Make) -> None:
    qwen = make(chat_templates.QWEN)

    choice = answered(qwen, f"{CALLED}\n{CALLED}", tools=[TOOL], parallel_tool_calls=False)

    assert len(choice["message"]["tool_calls"]) == 1


def test_without_tools_nothing_is_taken_for_a_call(make: Make) -> None:
    choice = answered(make(chat_templates.QWEN), CALLED)

    assert choice["message"] == {"role": "assistant", "content": CALLED, "refusal": None}
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("template", "fields", "text", "reasoning", "content"),
    [
        (chat_templates.QWEN, {}, "<think>\na\n</think>\n\nb", "a", "b"),
        (chat_templates.QWEN, {}, "b", None, "b"),
        (chat_templates.QWEN, {}, "<think>\na", "a", None),
        (chat_templates.QWEN, {}, "<think>\n\n</think>\n\nb", "", "b"),
        (chat_templates.QWEN, {"reasoning_effort": "none"}, "a </think> b", None, "a </think> b"),
        (chat_templates.QWEN, {"include_reasoning": False}, "<think>a</think>b", None, "b"),
        (chat_templates.QWEN, {"include_reasoning": False}, "<think>a", None, ""),
        (chat_templates.R1, {}, "a\n</think>\n\nb", "a", "b"),
        (chat_templates.R1, {}, "a", "a", None),
        (chat_templates.PLAIN, {}, "<think>a</think>b", None, "<think>a</think>b"),
    ],
)
def test_a_thought_is_what_stands_between_the_marks_of_the_template(
    make: Make,
    template: str,
    fields: dict[str, Any],
    text: str,
    reasoning: str | None,
    content: str | None,
) -> None:
    message = answered(make(template), text, **fields)["message"]

    assert message.get("reasoning_content") == reasoning
    assert message["content"] == content


def test_a_stop_string_ends_what_is_read_of_special_tokens_too(make: Make) -> None:
    qwen = make(chat_templates.QWEN, special=("<tool_call>", "</tool_call>"))

    choice = answered(qwen, f"A mill. Stop. {CALLED}", tools=[TOOL], stop=["Stop"])

    assert choice["message"]["content"] == "A mill. "
    assert "tool_calls" not in choice["message"]


# ── what an answer is held to ───────────────────────────────────────────────────────────────────


def accepts(tokenizer: FileTokenizer, grammar: Grammar, text: str) -> bool:
    """Whether an answer may be this text, with special tokens where it has theirs."""
    check(grammar)
    grammars = Grammars(tokenizer)
    matcher = grammars.compile(grammar).wait()
    try:
        is_whole = False
        for token_id in tokenizer._file.encode(text, add_special_tokens=False).ids:
            is_whole = matcher.take(token_id)
        return is_whole or matcher.take(max(tokenizer.eos_token_ids))
    except InvalidSchema:
        return False
    finally:
        grammars.close()


def grammar_of(tokenizer: FileTokenizer, **body: Any) -> Grammar:
    params = prepared(tokenizer, **body).sampling()
    assert params is not None and params.grammar is not None
    return params.grammar


@pytest.mark.parametrize("special", [False, True], ids=["text", "special"])
@in_json
def test_a_call_that_is_required_is_held_to_its_format_and_schema(
    make: Make, form: ToolFormat, special: bool
) -> None:
    # given a model of that format, whose marks are special tokens or text
    template = "{{ messages }}{{ tools }}" + " ".join(form.signs)
    tokenizer = make(template, special=form.marks if special else ())
    grammar = grammar_of(tokenizer, tools=[TOOL], tool_choice="required")
    good, bad = ("grind", {"fine": True}), ("grind", {"fine": 1})

    # then it may write that call, several of them, and nothing else
    assert accepts(tokenizer, grammar, written(form, [good]))
    assert accepts(tokenizer, grammar, written(form, [good, good]))
    assert not accepts(tokenizer, grammar, written(form, [bad]))
    assert not accepts(tokenizer, grammar, written(form, [("mill", {"fine": True})]))
    assert not accepts(tokenizer, grammar, "A mill.")
    choice = answered(tokenizer, written(form, [good]), tools=[TOOL], tool_choice="required")
    assert choice["message"]["tool_calls"][0]["function"] == {
        "name": "grind",
        "arguments": '{"fine": true}',
    }


MILL: Final = {"type": "function", "function": {"name": "mill"}}
NAMED: Final = {"type": "function", "function": {"name": "grind"}}
ONLY: Final = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}
MILLED: Final = CALLED.replace("grind", "mill").replace('{"fine": true}', "{}")


@pytest.mark.parametrize(
    ("fields", "taken", "refused"),
    [
        ({"tool_choice": "required"}, [CALLED, MILLED, f"{CALLED}\n{MILLED}"], ["A mill."]),
        ({"tool_choice": NAMED}, [CALLED], [MILLED, f"{CALLED}\n{CALLED}"]),
        ({"tool_choice": ONLY}, [CALLED, f"{CALLED}\n{CALLED}"], [MILLED]),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            [CALLED, MILLED],
            [f"{CALLED}\n{MILLED}"],
        ),
        (
            {"tool_choice": "required"},
            [f"<think>\nI <b> call.\n</think>\n\n{CALLED}", CALLED],
            ["<think>\nI call."],
        ),
        (
            {"tool_choice": "required", "reasoning_effort": "none"},
            [CALLED],
            [f"<think>a</think>{CALLED}"],
        ),
        (
            {"response_format": {"type": "json_object"}},
            [CALLED, '{"a": 1}', '<think>a</think>{"a": 1}', f"<think>a</think>{CALLED}"],
            ["A mill."],
        ),
        (
            {"structured_outputs": {"choice": ["yes", "no"]}, "tool_choice": "none"},
            ["yes", "<think>a</think>\n\nno"],
            ["maybe", CALLED],
        ),
    ],
)
@pytest.mark.parametrize("special", [False, True], ids=["text", "special"])
def test_choices_of_tools_formats_and_thoughts_go_together(
    make: Make,
    special: bool,
    fields: dict[str, Any],
    taken: list[str],
    refused: list[str],
) -> None:
    marks = ("<tool_call>", "</tool_call>", "<think>", "</think>") if special else ()
    qwen = make(chat_templates.QWEN, special=marks)

    grammar = grammar_of(qwen, tools=[TOOL, MILL], **fields)

    assert [text for text in taken if not accepts(qwen, grammar, text)] == []
    assert [text for text in refused if accepts(qwen, grammar, text)] == []


def test_a_thought_that_the_prompt_begins_is_ended_before_the_answers_format(make: Make) -> None:
    tokenizer = make(chat_templates.R1)
    grammar = grammar_of(tokenizer, response_format={"type": "json_object"})

    assert accepts(tokenizer, grammar, 'a\n</think>\n\n{"b": 1}')
    assert not accepts(tokenizer, grammar, '{"b": 1}')


def test_a_plain_answers_format_is_the_grammar_it_was(make: Make) -> None:
    grammar = grammar_of(make(chat_templates.PLAIN), response_format={"type": "json_object"})

    assert grammar == Grammar("json_schema", '{"type":"object"}')


def test_a_tools_schema_that_no_grammar_knows_is_refused_where_it_has_to_be_called(
    make: Make,
) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tool = {"type": "function", "function": {"name": "grind", "parameters": schema}}
    qwen = make(chat_templates.QWEN)

    prepared(qwen, tools=[tool])
    with pytest.raises(InvalidSchema):
        check(grammar_of(qwen, tools=[tool], tool_choice="required"))


GRINDING: Final = {
    "type": "object",
    "properties": {
        "grain": {"type": "string"},
        "size": {"type": "string", "enum": ["fine", "coarse"]},
        "stones": {"type": "integer"},
    },
    "required": ["grain", "stones"],
}


def _coder(**given: Any) -> str:
    arguments = "".join(f"<parameter={key}>\n{it}\n</parameter>\n" for key, it in given.items())
    return f"<tool_call>\n<function=grind>\n{arguments}</function>\n</tool_call>"


def _glm(**given: Any) -> str:
    arguments = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{it}</arg_value>\n" for key, it in given.items()
    )
    return f"<tool_call>grind\n{arguments}</tool_call>"


@pytest.mark.parametrize("special", [False, True], ids=["text", "special"])
@pytest.mark.parametrize(
    ("signs", "write"),
    [("<tool_call> <function= <parameter=", _coder), ("<tool_call> <arg_key> <arg_value>", _glm)],
    ids=["coder", "glm"],
)
def test_arguments_in_tags_are_held_to_their_schemas(
    make: Make, signs: str, write: Callable[..., str], special: bool
) -> None:
    form = format_of(signs)
    assert form is not None
    tokenizer = make("{{ tools }}" + signs, special=form.marks if special else ())
    tool = {"type": "function", "function": {"name": "grind", "parameters": GRINDING}}

    grammar = grammar_of(tokenizer, tools=[tool], tool_choice="required")

    assert accepts(tokenizer, grammar, write(grain="rye <b>", stones=2))
    assert accepts(tokenizer, grammar, write(grain="", size="fine", stones=-1))
    assert not accepts(tokenizer, grammar, write(grain="rye"))
    assert not accepts(tokenizer, grammar, write(grain="rye", size="middle", stones=2))
    assert not accepts(tokenizer, grammar, write(grain="rye", stones="two"))
