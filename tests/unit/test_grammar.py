"""Outputs match their schema or regular expression; what cannot be matched fails alone."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits

from app.config.settings import ModelSettings
from app.engines.base import Engine, Generation, Sequence
from app.engines.inflight.engine import InflightEngine
from app.engines.sampling import grammar as grammar_module
from app.engines.sampling.grammar import CACHE_SIZE, Grammars, check
from app.engines.text.tokenizer import load_tokenizer
from app.errors import InvalidSchema
from app.jobs import FinishReason, Grammar, Kind, SamplingParams
from tests.unit import tiny_models, tiny_tokenizers
from tests.unit.tiny_models import EOS, load

PROMPT = tuple(b"the mill")
MILL = {
    "type": "object",
    "properties": {
        "wheel": {"enum": ["overshot", "undershot"]},
        "stones": {"type": "integer", "minimum": 1, "maximum": 12},
        "runs": {"type": "boolean"},
        "age": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 900}, {"type": "null"}]},
    },
    "required": ["wheel", "stones", "runs", "age"],
    "additionalProperties": False,
}
DATE = Grammar("regex", r"[12]\d{3}-(0[1-9]|1[0-2])-[0-3][0-9]")


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def sequence(id_: int, grammar: Grammar | None, **params: Any) -> Sequence:
    fields: dict[str, Any] = {"max_tokens": 80, "seed": id_, "grammar": grammar}
    return Sequence(id_, PROMPT, SamplingParams(**fields | params))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_llama(tmp_path_factory.mktemp("grammar") / "model")


@pytest.fixture(scope="module", params=["inflight", "generate"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Engine:
    return load(folder, request.param)


@pytest.fixture(scope="module")
def inflight(folder: Path) -> InflightEngine:
    engine = load(folder)
    assert isinstance(engine, InflightEngine)
    return engine


def run(engine: Engine, *sequences: Sequence) -> dict[int, Generation]:
    engine.admit("batch", sequences)
    return run_out(engine)


def run_out(engine: Engine) -> dict[int, Generation]:
    found = {}
    while engine.has_work:
        found.update({each.sequence_id: each for each in engine.step()})
    return found


# ── matching ────────────────────────────────────────────────────────────────────────────────────

SMALL = st.recursive(
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": "integer", "minimum": -99, "maximum": 2000},
            {"type": "string", "maxLength": 4},
            {"type": "string", "pattern": "^[a-c]{2,5}$"},
            {"enum": ["overshot", 7, None, "§ é"]},
            {"const": {"a": [1, 2]}},
        ]
    ),
    lambda inner: st.one_of(
        st.builds(lambda each: {"type": "array", "items": each, "maxItems": 2}, inner),
        st.builds(
            lambda fields: {
                "type": "object",
                "properties": fields,
                "required": [*fields],
                "additionalProperties": False,
            },
            st.dictionaries(st.sampled_from(["a", "b", "ü"]), inner, max_size=2),
        ),
        st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner),
    ),
    max_leaves=4,
)


@given(
    st.lists(
        st.tuples(SMALL, st.integers(0, 2**40), st.sampled_from([0.0, 0.7, 1.5])),
        min_size=1,
        max_size=8,
    )
)
@settings(max_examples=8, deadline=None)
def test_outputs_that_end_are_json_that_their_schema_allows(
    inflight: InflightEngine, wanted: list[tuple[Any, int, float]]
) -> None:
    answers = run(
        inflight,
        *(
            sequence(i, schema(value), seed=seed, temperature=temperature, max_tokens=50)
            for i, (value, seed, temperature) in enumerate(wanted)
        ),
    )

    for i, (value, _, _) in enumerate(wanted):
        if answers[i].finish_reason is FinishReason.STOP:
            jsonschema.validate(json.loads(answers[i].text), value)
        else:
            assert answers[i].finish_reason is FinishReason.LENGTH
            assert len(answers[i].token_ids) == 50


@pytest.mark.parametrize(
    "regex", [DATE.text, "(yes|no)", r"[a-z]{3,7}\.(com|org)", "naïve|🙂{2}", r"\d{3}-[A-F0-9]+x"]
)
def test_an_output_that_ends_matches_the_whole_expression(engine: Engine, regex: str) -> None:
    sequences = [
        sequence(i, Grammar("regex", regex), temperature=t, ignore_eos=i % 2 == 0)
        for i, t in enumerate([0.0, 0.5, 1.0, 1.0, 2.0])
    ]

    answers = run(engine, *sequences)

    ended = [each for each in answers.values() if each.finish_reason is FinishReason.STOP]
    assert len(ended) >= 4
    for answer in ended:
        assert re.fullmatch(regex, answer.text), answer.text


def test_the_end_of_the_grammar_ends_the_output_without_a_token_for_it(engine: Engine) -> None:
    answer = run(engine, sequence(1, DATE))[1]

    assert answer.finish_reason is FinishReason.STOP
    assert len(answer.token_ids) == len("2024-11-23")


def test_where_the_grammar_allows_an_end_the_model_decides(engine: Engine) -> None:
    answers = run(engine, *(sequence(i, Grammar("regex", "[a-z]{0,60}")) for i in range(6)))

    lengths = {len(each.text) for each in answers.values()}
    assert len(lengths) > 1
    for answer in answers.values():
        assert answer.finish_reason is FinishReason.STOP
        assert re.fullmatch("[a-z]{0,60}", answer.text)
        assert answer.token_ids[-1] == EOS or len(answer.text) == 60


def test_keys_come_in_the_order_of_the_schema(engine: Engine) -> None:
    answer = run(engine, sequence(1, schema(MILL)))[1]

    assert list(json.loads(answer.text)) == ["wheel", "stones", "runs", "age"]


def test_rows_without_a_grammar_are_unchanged_token_for_token(engine: Engine) -> None:
    plain = [
        sequence(1, None, max_tokens=30, temperature=0.0),
        sequence(2, None, max_tokens=40),
        sequence(3, None, max_tokens=40, top_p=0.8, presence_penalty=1.0, logprobs=2),
    ]
    expected = run(engine, *plain)
    held = [sequence(10 + i, each) for i, each in enumerate([DATE, schema(MILL), DATE])]

    mixed = run(engine, held[0], plain[0], held[1], plain[1], plain[2], held[2])

    for each in plain:
        assert mixed[each.id].token_ids == expected[each.id].token_ids
        assert mixed[each.id].text == expected[each.id].text


def test_an_output_is_the_same_in_any_company_and_in_either_engine(folder: Path) -> None:
    wanted = [
        sequence(1, schema(MILL), temperature=0.0),
        sequence(2, schema(MILL), temperature=1.0, top_k=20),
        sequence(3, schema(MILL), frequency_penalty=0.5, repetition_penalty=1.2, top_p=0.9),
        sequence(4, DATE, min_p=0.01),
    ]
    company = [sequence(20 + i, each) for i, each in enumerate([DATE, None, schema(MILL)])]
    alone = [run(load(folder), each)[each.id].token_ids for each in wanted]

    together = run(load(folder, rows=3), *company, *wanted)
    static = run(load(folder, "generate"), *wanted)

    assert [together[each.id].token_ids for each in wanted] == alone
    assert [static[each.id].token_ids for each in wanted] == alone


def test_a_row_that_loses_its_place_goes_on_in_its_grammar(folder: Path) -> None:
    # given a cache of 2 blocks of 32 for rows that want 2 each
    wanted = [sequence(i, schema(MILL)) for i in range(3)]
    expected = run(load(folder), *wanted)
    engine = load(folder, rows=3, cache_tokens=3 * 32)
    assert isinstance(engine, InflightEngine)
    lost: list[int] = []
    preempt = engine._scheduler._preempt

    def spy() -> Any:
        row = preempt()
        lost.append(row.sequence.id)
        return row

    engine._scheduler._preempt = spy  # type: ignore[method-assign]

    # when
    answers = run(engine, *wanted)

    # then
    assert lost
    for each in wanted:
        assert answers[each.id].text == expected[each.id].text
        jsonschema.validate(json.loads(answers[each.id].text), MILL)


def test_a_stop_string_ends_the_output_within_its_grammar(engine: Engine) -> None:
    answer = run(engine, sequence(1, schema(MILL), stop=(', "runs',)))[1]

    assert answer.finish_reason is FinishReason.STOP
    assert re.fullmatch(r'\{"wheel": "(over|under)shot", "stones": \d+', answer.text)


def test_max_tokens_cut_an_output_short(engine: Engine) -> None:
    answer = run(engine, sequence(1, schema(MILL), max_tokens=10))[1]

    assert answer.finish_reason is FinishReason.LENGTH
    assert answer.text == '{"wheel": '[:10]


def test_log_probabilities_are_the_models_own_before_the_grammar(inflight: InflightEngine) -> None:
    held = sequence(1, Grammar("regex", "[xyz]{5}"), logprobs=3)

    answer = run(inflight, held)[1]

    tokens = torch.tensor([[*PROMPT, *answer.token_ids]])
    free = run(inflight, Sequence(2, PROMPT, SamplingParams(1, temperature=0.0, logprobs=3)))[2]
    assert answer.logprobs and free.logprobs
    assert [each.token_id for each in answer.logprobs] == tokens[0, len(PROMPT) :].tolist()
    ids, values = zip(*answer.logprobs[0].top, strict=True)
    free_ids, free_values = zip(*free.logprobs[0].top, strict=True)
    assert ids == free_ids
    assert values == pytest.approx(free_values, abs=1e-5)  # float32 rounds by the company
    assert answer.logprobs[0].logprob < free.logprobs[0].logprob


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("inflight", tiny_models.save_llama),
        ("generate", tiny_models.save_llama),
        ("generate", tiny_models.save_t5),
    ],
    ids=["inflight", "generate", "encoder-decoder"],
)
def test_an_answer_in_words_that_begin_with_their_blank_matches(
    tmp_path: Path, name: str, save: Callable[[Path], Path]
) -> None:
    # given a vocabulary in which nearly all words bring the blank before them
    folder = save(tmp_path / "model")
    (folder / "tokenizer_config.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 2}
    tiny_tokenizers.save(tiny_tokenizers.unigram(), folder, config)
    engine = load(folder, name)
    pattern = "(the|yes) (mill|wheel)[a-z ]{3}"

    # when
    answers = run(
        engine,
        *(sequence(i, Grammar("regex", pattern), temperature=1.5) for i in range(6)),
        sequence(9, None, temperature=1.5, stop=(" the", " mill")),
    )

    # then
    assert all(re.fullmatch(pattern, answers[i].text) for i in range(6))
    assert " the" not in answers[9].text


# ── what cannot be matched ──────────────────────────────────────────────────────────────────────

_DEEP: dict[str, Any] = {"type": "null"}
for _ in range(200):
    _DEEP = {"type": "object", "properties": {"a": _DEEP}, "required": ["a"]}

BAD = {
    "unknown type": (schema({"type": "strang"}), "strang"),
    "unsupported": (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    "conditional": (schema({"if": {"type": "string"}, "then": {"minLength": 2}}), "if"),
    "remote": (schema({"$ref": "http://127.0.0.1:9/schema.json"}), "does not fetch"),
    "file": (schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
    "missing": (schema({"$ref": "#/$defs/nothing"}), "does not exist"),
    "nothing": (schema({"allOf": [{"type": "string"}, {"type": "null"}]}), "Unsatisfiable"),
    "recursion": (schema(_DEEP), "recursion"),
    "no json": (Grammar("json_schema", "{"), "cannot be used"),
    "unclosed": (Grammar("regex", "((("), "unclosed group"),
    "lookaround": (Grammar("regex", "(?=a)b"), "look-around"),
    "backreference": (Grammar("regex", r"(a)\1"), "backreferences"),
}
ONLY_WITH_A_MODEL = {
    "endless": (schema({"$ref": "#"}), "nothing can match"),
    "huge enum": (schema({"enum": [f"value-{i}" for i in range(30_000)]}), "too big"),
}


@pytest.mark.parametrize(("grammar", "words"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_told_in_one_line_before_a_model_is_asked(
    grammar: Grammar, words: str
) -> None:
    with pytest.raises(InvalidSchema, match=re.escape(words)) as refused:
        check(grammar)

    assert refused.value.code == "invalid_schema"
    assert "\n" not in refused.value.message and len(refused.value.message) < 300


@pytest.mark.parametrize("grammar", [schema(MILL), DATE, schema({"type": "object"})])
def test_what_is_right_passes(grammar: Grammar) -> None:
    check(grammar)


@pytest.mark.parametrize(
    ("grammar", "words"),
    (BAD | ONLY_WITH_A_MODEL).values(),
    ids=BAD | ONLY_WITH_A_MODEL,
)
def test_what_is_wrong_fails_alone(engine: Engine, grammar: Grammar, words: str) -> None:
    mate = sequence(2, None, max_tokens=12)
    expected = run(engine, mate)[2]

    answers = run(engine, sequence(1, grammar), mate, sequence(3, DATE))

    assert answers[1].finish_reason is FinishReason.ERROR
    assert answers[1].error_code == "invalid_schema"
    assert words in (answers[1].error_message or "")
    assert answers[1].token_ids == []
    assert answers[2].token_ids == expected.token_ids
    assert re.fullmatch(DATE.text, answers[3].text)


def test_a_grammar_that_grows_beyond_the_limits_on_the_way_fails_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given limits that are met early
    monkeypatch.setattr(grammar_module, "_LIMITS", LLParserLimits(max_lexer_states=30))
    bomb = Grammar("regex", "[a-z]{60}")
    mate = sequence(2, None, max_tokens=60)
    expected = run(engine, mate)[2]

    answers = run(engine, sequence(1, bomb), mate)

    assert answers[1].finish_reason is FinishReason.ERROR
    assert answers[1].error_code == "invalid_schema"
    assert answers[1].token_ids
    assert answers[2].token_ids == expected.token_ids


# ── compiling beside the engine ─────────────────────────────────────────────────────────────────


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Schemas do not get through the compiler before this is set; regular expressions do."""
    gate = threading.Event()
    compile_ = grammar_module._compile

    def gated(grammar: Grammar, *rest: Any) -> Any:
        if grammar.kind == "json_schema":
            assert gate.wait(60)
        return compile_(grammar, *rest)

    monkeypatch.setattr(grammar_module, "_compile", gated)
    return gate


def test_a_row_waits_for_its_grammar_and_holds_nobody_up(
    folder: Path, gate: threading.Event
) -> None:
    engine = load(folder)
    engine.admit("b", [sequence(1, schema(MILL)), sequence(2, None, max_tokens=9)])
    engine.admit("b", [sequence(3, DATE)])

    ended: dict[int, Generation] = {}
    while len(ended) < 2:
        ended.update({each.sequence_id: each for each in engine.step()})
    assert ended.keys() == {2, 3}
    assert engine.has_work and engine.step() == []

    gate.set()
    jsonschema.validate(json.loads(run_out(engine)[1].text), MILL)


def test_a_row_is_cancelled_while_its_grammar_compiles(folder: Path, gate: threading.Event) -> None:
    engine = load(folder, rows=1)
    engine.admit("b", [sequence(1, schema(MILL))])
    engine.step()

    engine.cancel(1)
    [answer] = engine.step()

    assert answer.finish_reason is FinishReason.CANCELLED
    assert engine.free_rows == 1 and not engine.has_work
    gate.set()


@pytest.mark.parametrize("name", ["inflight", "generate"])
def test_a_grammar_that_compiles_too_long_fails_alone(
    folder: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(grammar_module, "COMPILE_TIMEOUT_S", 0.2)

    answers = run(load(folder, name), sequence(1, schema(MILL)), sequence(2, DATE))

    assert answers[1].error_code == "invalid_schema"
    assert "seconds to compile" in (answers[1].error_message or "")
    assert re.fullmatch(DATE.text, answers[2].text)
    gate.set()


def test_each_grammar_is_compiled_once_and_only_so_many_are_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    compiled: list[str] = []
    compile_ = grammar_module._compile

    def counted(grammar: Grammar, *rest: Any) -> Any:
        compiled.append(grammar.text)
        return compile_(grammar, *rest)

    monkeypatch.setattr(grammar_module, "_compile", counted)
    model = ModelSettings(source="tiny", kind=Kind.GENERATE, engine="inflight")
    grammars = Grammars(load_tokenizer(folder, model))

    # when more are asked for than are kept, and one of them all the time
    for i in range(2 * CACHE_SIZE):
        grammars.compile(DATE).wait()
        grammars.compile(Grammar("regex", f"v{i}")).wait()

    # then
    assert compiled.count(DATE.text) == 1
    assert len(grammars._cache) == CACHE_SIZE
    grammars.compile(Grammar("regex", "v0")).wait()
    assert compiled.count("v0") == 2


def test_matchers_of_one_grammar_know_nothing_of_each_other(inflight: InflightEngine) -> None:
    wanted = [sequence(i, schema(MILL), temperature=1.5) for i in range(8)]

    answers = run(inflight, *wanted)

    assert len({each.text for each in answers.values()}) > 1
    for answer in answers.values():
        jsonschema.validate(json.loads(answer.text), MILL)


@pytest.mark.parametrize("shift", range(4))
def test_a_bug_in_the_library_is_a_refusal_of_that_schema(shift: int) -> None:
    """It panics where it cuts a long text for its error inside a character."""
    wrong = schema({"minItems": ["x" * shift + "\U000492d5" * 60]})

    with pytest.raises(InvalidSchema):
        check(wrong)


_WORDS = ["type", "properties", "items", "anyOf", "allOf", "$ref", "$defs", "enum", "const"]
_WORDS += ["minimum", "multipleOf", "pattern", "format", "required", "maxLength", "minItems"]
_ANY_SCHEMA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_WORDS), inner, max_size=4)
    ),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(_WORDS), _ANY_SCHEMA, max_size=4).map(schema)
    | st.text(max_size=30).map(lambda text: Grammar("regex", text))
)
def test_any_grammar_is_taken_or_refused(grammar: Grammar) -> None:
    with contextlib.suppress(InvalidSchema):
        check(grammar)
