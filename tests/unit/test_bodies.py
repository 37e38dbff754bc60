"""Requests as they are accepted, and what an engine is given of them."""

from __future__ import annotations

import sys
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from pydantic import ValidationError

from app.config.settings import ModelSettings
from app.engines.base import Generation, Sequence, TokenLogprob
from app.engines.text.tokenizer import StubTokenizer
from app.errors import InvalidSchema, LaterFormat, RequestError
from app.intake import submit
from app.intake.submit import parse_submission
from app.jobs import FinishReason, Kind, SamplingParams
from app.requests import bodies, problems, replies
from app.requests.bodies import BODIES, FORMAT, Url, parse, parse_stored, readable
from app.requests.prepare import prepare
from tests.any_messages import FIELDS, requests
from tests.unit.inflight_tiny import engine_of, run_all

STUB = ModelSettings(source="stub", kind=Kind.GENERATE, engine="stub")


def sampling(answer: int = 0, **fields: Any) -> SamplingParams:
    request = parse({"prompt": "flour", "max_tokens": 8} | fields)
    params = prepare(request, StubTokenizer(STUB), STUB).sampling(answer)
    assert params is not None
    return params


def test_the_seeds_of_several_answers_stay_within_64_bits() -> None:
    seeds = [sampling(answer, seed=2**63 - 1, n=3).seed for answer in range(3)]

    assert seeds == [2**63 - 1, -(2**63), -(2**63) + 1]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 1e-50},
        {"top_p": 5e-324, "top_k": 5},
        {"temperature": 1e-300},
        {"temperature": 1e-5, "min_p": 1e-320},
        {"min_p": 1.0},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 5e-324, "frequency_penalty": -2, "presence_penalty": 5e-324},
        {"top_k": 2**31 - 1},
        {"seed": 2**63 - 1, "n": 2},
        {"logprobs": 20, "top_p": 1e-50},
    ],
    ids=str,
)
def test_the_strangest_numbers_that_are_accepted_are_answered(fields: dict[str, Any]) -> None:
    # given a request with them, among ordinary ones
    odd = [sampling(answer, **fields) for answer in range(fields.get("n", 1))]
    rows = [sampling(temperature=0), *odd, sampling(seed=1)]

    # when an engine runs them together
    engine = engine_of("llama", rows=len(rows))
    answers = run_all(engine, [Sequence(i, (1, 2, 3), params) for i, params in enumerate(rows)])
    engine.close()

    # then all have their tokens
    assert [len(answers[i].token_ids) for i in range(len(rows))] == [8] * len(rows)


def test_a_known_field_that_is_null_counts_as_left_out() -> None:
    given = parse({"prompt": "flour", "temperature": None, "stop": None, "messages": None})

    assert given == parse({"prompt": "flour"})
    assert given.fingerprint == parse({"prompt": "flour"}).fingerprint


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"color": None}, "color"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"top_k": 10**400}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"prompt": [2**31]}, "prompt.0"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"stop": ["a\0"]}, "stop.0"),
        ({"user": "\udfff"}, "user"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else given,
)
def test_what_neither_store_nor_engine_could_hold_is_refused(
    fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as refused:
        parse({"prompt": "flour"} | fields)

    assert (refused.value.param or "").startswith(param.partition(".")[0])


def test_a_schema_with_numbers_that_cannot_be_written_is_refused() -> None:
    schema = {"maximum": float("inf")}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

    with pytest.raises(InvalidSchema):
        parse({"prompt": "flour", "response_format": form})


def test_a_stored_request_of_a_later_format_is_for_others_and_not_wrong() -> None:
    assert readable(FORMAT)
    assert not readable(FORMAT + 1)
    with pytest.raises(LaterFormat):
        parse_stored({"prompt": "flour", "thinking": "hard"}, None, FORMAT + 1)


@pytest.mark.parametrize("raw", [None, [], 7, {}, {"prompt": 7}, {"thinking": "hard"}, object()])
def test_a_stored_request_that_is_wrong_is_an_error_of_its_own(raw: object) -> None:
    with pytest.raises(RequestError) as refused:
        parse_stored(raw, "/v1/completions", FORMAT)

    assert not isinstance(refused.value, LaterFormat)


@pytest.mark.parametrize("item", [0.5, None, "", [], ["a"], -1])
@pytest.mark.parametrize(
    ("field", "url"),
    [("prompt", Url.COMPLETIONS), ("input", Url.EMBEDDINGS), ("messages", Url.CHAT)],
)
def test_of_many_wrong_items_only_the_first_is_told(field: str, url: Url, item: Any) -> None:
    # given many wrong items: half a million have room in a message
    raw = {field: [item] * 10_000}

    # when they are checked
    with pytest.raises(ValidationError) as caught:
        BODIES[url].model_validate(raw)

    # then there are not as many errors, each a kilobyte
    assert caught.value.error_count() < 10


MANY = 3_000
_ITEMS = st.sampled_from([-1, 1, 2**31, 0.5, None, "", "a", "\0", [], [-1], ["a"], {}, {"a": []}])


@st.composite
def crowds(draw: st.DrawFn) -> tuple[object, int]:
    """A list or an object with many items of a kind, perhaps some levels deep."""
    number = draw(st.integers(1, MANY))
    item = draw(_ITEMS)
    crowd = draw(st.sampled_from([[item] * number, {f"k{i}": item for i in range(number)}]))
    for wrap in draw(st.lists(st.sampled_from(["list", "role", "content", "schema"]), max_size=3)):
        crowd = [crowd] if wrap == "list" else {wrap: crowd}
    return crowd, number


@st.composite
def crowded_submissions(draw: st.DrawFn) -> tuple[object, int]:
    """A submission, mostly a good one, with a crowd as one of its fields or among them."""
    crowd, number = draw(crowds())
    body: Any = draw(requests())
    submission: dict[str, Any] = {"body": body}
    field = draw(st.sampled_from([*FIELDS, "color"]))
    match draw(st.integers(0, 4)):
        case 0:
            return crowd, number
        case 1 if isinstance(crowd, dict):
            return submission | crowd, number
        case 2 if isinstance(crowd, dict):
            return {"body": body | crowd}, number
        case 3:
            return submission | {
                draw(st.sampled_from(["metadata", "url", "deadline"])): crowd
            }, number
        case _:
            return {"body": body | {field: crowd}}, number


@hypothesis.settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(crowded_submissions())
def test_whatever_is_submitted_costs_as_much_as_there_is_of_it_and_only_one_thing_is_told(
    given: tuple[object, int],
) -> None:
    # given a submission that is large in some place
    value, number = given
    errors: list[int] = []
    told = problems.first_problem
    calls = 0

    def count(_: object, event: str, __: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    def first_problem(error: ValidationError, raw: dict[str, Any]) -> RequestError:
        errors.append(error.error_count())
        return told(error, raw)

    # when it is checked
    with pytest.MonkeyPatch.context() as patched:
        for module in (bodies, submit):
            patched.setattr(module, "first_problem", first_problem)
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            parse(parse_submission(value).body)
        except RequestError as error:
            said = f"{error.message} {error.param}"
        else:
            said = ""
        finally:
            sys.setprofile(before)

    # then neither the work nor what is told of it grows beyond what there is
    assert calls < 2_000 + 40 * number
    assert all(each < 40 for each in errors)
    assert len(said) < 1_000


@pytest.mark.timeout(60)
def test_the_log_probabilities_of_a_long_answer_are_written_at_once() -> None:
    # given an answer as long as the longest contexts; the runner stands still while it is written
    tokens = 200_000
    request = parse({"prompt": "flour", "logprobs": 0})
    scores = [TokenLogprob(ord("a"), -1.0, ())] * tokens
    tokenizer = StubTokenizer(ModelSettings(source="stub", kind=Kind.GENERATE, engine="stub"))
    answer = Generation(1, FinishReason.LENGTH, text="a" * tokens, logprobs=scores)

    # when it is told
    body = replies.body(
        request,
        [answer],
        job_id="1",
        model="stub",
        created=0,
        tokenizer=tokenizer,
        prompts=[[1]],
    )

    # then each token has its place in the text
    assert body["choices"][0]["logprobs"]["text_offset"] == list(range(tokens))


def _patterns(number: int) -> list[dict[str, Any]]:
    return [{"type": "string", "pattern": f"(a|b)*a(a|b){{{n}}}"} for n in range(number)]


def _asking_for(schema: dict[str, Any]) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "mill", "schema": schema}}
    return {"prompt": "flour", "response_format": form}


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": _patterns(20)},
        {"allOf": [{"properties": {"a": each}} for each in _patterns(20)]},
        {"allOf": [{"anyOf": [each, {"type": "null"}]} for each in _patterns(20)]},
        {
            "$defs": {
                f"d{n}": each | {"$ref": f"#/$defs/d{n + 1}"}
                for n, each in enumerate(_patterns(20))
            }
            | {"d20": {}},
            "$ref": "#/$defs/d0",
        },
        {
            "$defs": {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(2_000)},
            "$ref": "#/$defs/d0",
        },
    ],
)
def test_a_schema_that_the_grammar_library_would_take_for_ever_for_is_refused(
    schema: dict[str, Any],
) -> None:
    with pytest.raises(InvalidSchema, match=r"patterns meet in one text|lead too far"):
        parse(_asking_for(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {f"p{n}": each for n, each in enumerate(_patterns(50))}},
        {"$defs": {"a": {"items": {"$ref": "#/$defs/a"}, "pattern": "x"}}, "$ref": "#/$defs/a"},
        {"anyOf": _patterns(50)},
        {"allOf": _patterns(5)},
        {"properties": {"pattern": {}, "allOf": {}, "$ref": {"pattern": "x"}}},
        {"$ref": "#"},
        {"$ref": "#/no/such/place", "pattern": "x"},
    ],
)
def test_a_schema_of_many_patterns_for_many_texts_is_taken(schema: dict[str, Any]) -> None:
    parse(_asking_for(schema))


@pytest.mark.parametrize(
    ("fields", "beams"),
    [
        ({}, None),
        ({"temperature": 0}, None),
        ({"temperature": 0, "top_p": 1.0}, None),
        ({"temperature": 0.7}, 1),
        ({"seed": 1}, 1),
        ({"n": 2}, 1),
        ({"num_beams": 4, "n": 2}, 4),
        ({"num_beams": 1}, 1),
    ],
)
def test_a_request_leaves_beams_to_the_model_unless_it_asks_for_draws(
    fields: dict[str, Any], beams: int | None
) -> None:
    request = parse({"prompt": "a mill"} | fields)

    params = prepare(request, StubTokenizer(STUB), STUB).params

    assert params is not None
    assert params.num_beams == beams


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"top_p": 0.5}, "top_p"),
        ({"n": 4}, "n"),
        ({"stop": "x"}, "stop"),
        ({"logprobs": 1}, "logprobs"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
    ],
)
def test_what_does_not_go_with_beams_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse({"prompt": "a mill", "num_beams": 3} | fields)

    assert refused.value.param == param


def test_beams_are_refused_where_the_models_engine_has_none() -> None:
    request = parse({"prompt": "a mill", "num_beams": 3})
    settings = ModelSettings(source="x", kind=Kind.GENERATE, engine="inflight")

    with pytest.raises(RequestError, match="engine, inflight, does not search with beams"):
        prepare(request, StubTokenizer(STUB), settings)
