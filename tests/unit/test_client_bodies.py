"""Bodies as clients write them: nulls, neutral values, numbers of other languages, their extras."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.settings import ModelSettings
from app.engines.text.tokenizer import StubTokenizer
from app.errors import RequestError
from app.jobs import Kind, SamplingParams
from app.requests.bodies import BODIES, FORMAT, Url, parse, parse_stored
from app.requests.handling import handling_of
from app.requests.prepare import prepare

STUB = ModelSettings(source="stub", kind=Kind.GENERATE, engine="stub")
USER = {"role": "user", "content": "flour"}
NEUTRAL: dict[str, Any] = {
    "logit_bias": {},
    "tools": [],
    "best_of": 1,
    "store": False,
    "n": 1,
    "stop": [],
    "stop_token_ids": [],
    "bad_words": [],
    "min_tokens": 0,
    "echo": False,
    "stream": False,
    "functions": [],
    "function_call": "none",
    "modalities": ["text"],
    "metadata": {},
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "chat_template_kwargs": {},
    "response_format": {"type": "text"},
}


def params(**fields: Any) -> SamplingParams:
    found = prepare(parse({"prompt": "flour", **fields}), StubTokenizer(STUB), STUB).sampling()
    assert found is not None
    return found


@pytest.mark.parametrize("url", [Url.CHAT, Url.COMPLETIONS])
def test_values_that_ask_for_nothing_are_taken_and_change_nothing(url: Url) -> None:
    bare = {"messages": [USER]} if url is Url.CHAT else {"prompt": "flour"}
    neutral = {name: it for name, it in NEUTRAL.items() if name in BODIES[url].model_fields}

    asked = prepare(parse(bare | neutral), StubTokenizer(STUB), STUB)

    assert asked == prepare(parse(bare), StubTokenizer(STUB), STUB)


@given(st.sampled_from(list(Url)), st.data())
def test_every_field_but_the_prompts_may_be_null(url: Url, data: st.DataObject) -> None:
    body = {Url.CHAT: {"messages": [USER]}, Url.COMPLETIONS: {"prompt": "flour"}}.get(
        url, {"input": "flour"}
    )
    optional = [name for name, it in BODIES[url].model_fields.items() if not it.is_required()]
    if any(name not in body and it.is_required() for name, it in BODIES[url].model_fields.items()):
        return  # of another shape
    nulls = dict.fromkeys(data.draw(st.lists(st.sampled_from(optional), unique=True)))

    assert parse(body | nulls, url) == parse(body, url)


def test_null_within_messages_tools_and_formats_counts_as_left_out() -> None:
    function = {"name": "grind", "description": None, "parameters": None, "strict": None}
    schema = {"name": "mill", "schema": {"type": "object"}, "strict": None, "description": None}
    body = {
        "messages": [{"role": "user", "content": "flour", "name": None, "tool_calls": None}],
        "tools": [{"type": "function", "function": function}],
        "response_format": {"type": "json_schema", "json_schema": schema},
    }

    assert "null" not in json.dumps(parse(body).raw)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 16.0),
        ("min_tokens", 2.0),
        ("top_k", 40.0),
        ("n", 2.0),
        ("seed", -7.0),
        ("logprobs", 2.0),
        ("stop_token_ids", [13.0, 14]),
        ("prompt", [1.0, 2]),
        ("prompt", [[1.0], [2, 3.0]]),
        ("best_of", 1.0),
    ],
)
def test_a_whole_number_may_be_written_with_a_point(field: str, value: Any) -> None:
    written = json.loads(json.dumps(value).replace(".0", ""))

    assert parse({"prompt": "a", field: value}).raw == parse({"prompt": "a", field: written}).raw


WHOLE_FIELDS = [
    pytest.param(url, name, field.examples[0], id=f"{url.rpartition('/')[2]}-{name}")
    for url, body in BODIES.items()
    for name, field in body.model_fields.items()
    if field.examples and type(field.examples[0]) is int and handling_of(field) is None
]


@pytest.mark.parametrize(("url", "name", "number"), WHOLE_FIELDS)
def test_every_field_that_is_a_whole_number_may_be_written_so(
    url: Url, name: str, number: int
) -> None:
    fields = BODIES[url].model_fields
    required = {it: field.examples for it, field in fields.items() if field.is_required()}
    body = {it: examples[0] if examples else [USER] for it, examples in required.items()}
    if name == "top_logprobs" and "logprobs" in fields:
        body["logprobs"] = True

    assert parse(body | {name: float(number)}, url) == parse(body | {name: number}, url)


@pytest.mark.parametrize("value", [16.5, True, "16", 1e300, float("nan"), float("inf"), [16]])
def test_what_is_no_whole_number_is_refused_by_name(value: Any) -> None:
    with pytest.raises(RequestError) as refused:
        parse({"prompt": "a", "max_tokens": value})

    assert refused.value.param == "max_tokens"


def test_what_favours_forbids_and_ends_tokens_reaches_the_sampler() -> None:
    found = params(
        logit_bias={"17": -100, "18": 2.5},
        stop_token_ids=[13],
        min_tokens=3,
        bad_words=["ab", " c"],
    )

    assert found.logit_bias == ((17, -100.0), (18, 2.5))
    assert (found.stop_token_ids, found.min_tokens) == ((13,), 3)
    a, b, c, blank = b"abc "
    assert found.bad_words == ((a, b), (blank, a, b), (c,), (blank, c))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"257": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": {"9" * 400: 1}}, "logit_bias"),
        ({"logit_bias": {str(n): 1 for n in range(2_000)}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stop_token_ids": [257]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"top_k": -2}, "top_k"),
    ],
)
def test_tokens_that_the_model_does_not_have_are_refused_by_name(
    fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as refused:
        params(**fields)

    assert (refused.value.param or "").split(".")[0] == param


def test_fewest_tokens_leave_room_for_them_where_no_most_is_asked_for() -> None:
    assert params(min_tokens=300).max_tokens == 300


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"regex": "a|b"}, "a|b"),
        ({"choice": ["a.b", "a|<b>", "x\n"]}, "a\\.b|a\\|<b>|x\n"),
        ({"json": {"type": "object"}}, '{"type":"object"}'),
        ({"json_object": True}, '{"type":"object"}'),
    ],
)
def test_other_output_formats_are_those_of_vllm(given: dict[str, Any], text: str) -> None:
    grammar = params(structured_outputs=given).grammar

    assert grammar is not None
    assert grammar.text == text


@pytest.mark.parametrize("given", [{}, {"regex": "a", "choice": ["b"]}, {"json_object": False}])
def test_one_output_format_is_to_be_given(given: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        params(structured_outputs=given)

    assert (refused.value.param or "").startswith("structured_outputs")


UNKNOWN: dict[str, Any] = {
    "prompt": "flour",
    "colour": "red",
    "structured_outputs": {"regex": "a", "hue": 7},
}


def test_unknown_fields_are_refused_by_name_or_left_out_at_any_depth() -> None:
    with pytest.raises(RequestError, match="Unknown field colour"):
        parse(UNKNOWN)

    taken = parse(UNKNOWN, unknown_fields="ignore")

    assert taken.raw == {"prompt": "flour", "structured_outputs": {"regex": "a"}}
    assert parse_stored(taken.raw, taken.url, FORMAT) == taken


def test_a_field_that_is_known_and_refused_is_not_ignored_with_the_unknown_ones() -> None:
    with pytest.raises(RequestError, match="best_of"):
        parse({"prompt": "flour", "best_of": 3}, unknown_fields="ignore")


def test_metadata_within_a_body_is_the_jobs_and_no_part_of_the_request() -> None:
    request = parse({"prompt": "flour", "metadata": {"order": "17"}})

    assert request.body.metadata == {"order": "17"}
    assert request.fingerprint == parse({"prompt": "flour"}).fingerprint


@pytest.mark.parametrize("off", [0, -1])
def test_top_k_is_off_at_zero_and_below_whatever_the_models_own_is(off: int) -> None:
    found = params(top_k=off)

    assert found.top_k == 0
    assert "top_k" not in found.unset
