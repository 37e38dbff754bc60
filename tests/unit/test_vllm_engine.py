"""The engine `vllm` over a stand-in for vLLM: what it hands over, and what it makes of the rest.

tests/e2e/test_real_vllm.py runs the real one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app.config.settings import ModelSettings, Settings
from app.engines import registry
from app.engines.base import Generation, NewTokens, Sequence, TokenLogprob
from app.engines.catalog import CatalogModel
from app.engines.text.tokenizer import Tokenizer
from app.engines.vllm import sampling
from app.engines.vllm.engine import VllmEngine
from app.errors import ConfigError, ModelNotFound
from app.jobs import FinishReason, Grammar, SamplingParams
from app.requests.bodies import parse
from app.worker import assembly
from tests import fake_vllm
from tests.fake_vllm import LLMEngine
from tests.unit import tiny_models
from tests.unit.full_params import FULL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    fake_vllm.install(monkeypatch)


def model(folder: Path, **given: Any) -> ModelSettings:
    plain = {"source": str(folder), "kind": "generate", "engine": "vllm", "max_batch_size": 8}
    return ModelSettings(**plain | given)


def engine(folder: Path, **given: Any) -> VllmEngine:
    made = VllmEngine(folder, model(folder, **given), "cpu", 0, lambda: None)
    [LLMEngine.eos, *_] = made._tokenizer.eos_token_ids
    return made


def sequence(id_: int, prompt: tuple[int, ...], **given: Any) -> Sequence:
    of_sequence = {name: given.pop(name) for name in ("stream", "adapter", "tenant") & given.keys()}
    return Sequence(id_, prompt, SamplingParams(**{"max_tokens": 20} | given), **of_sequence)


def run(engine: VllmEngine) -> tuple[dict[int, Generation], list[NewTokens]]:
    answers, new = {}, []
    while engine.has_work:
        answers |= {each.sequence_id: each for each in engine.step()}
        new += engine.take_tokens()
    return answers, new


def test_each_sequence_gets_its_own_tokens_and_their_text(folder: Path) -> None:
    inside = engine(folder)

    inside.admit("a", [sequence(1, (5, 6, 7)), sequence(2, tuple(range(10, 30)), max_tokens=4)])
    answers, _ = run(inside)

    assert answers[1].token_ids == [7, 6, 5, LLMEngine.eos]
    assert answers[1].text == inside._tokenizer.decode([7, 6, 5])
    assert (answers[1].finish_reason, answers[1].input_tokens) == (FinishReason.STOP, 3)
    assert answers[1].cached_tokens == 1
    assert answers[2].token_ids == [29, 28, 27, 26]
    assert answers[2].finish_reason is FinishReason.LENGTH
    assert answers[1].started_ns <= answers[1].first_token_ns <= answers[1].finished_ns


@hypothesis_settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    limits=st.lists(st.integers(1, 12), min_size=8, max_size=8),
    cancelled=st.sets(st.integers(0, 7)),
    when=st.integers(0, 12),
)
def test_the_shares_of_all_steps_add_up_exactly_whoever_comes_ends_or_is_cancelled(
    folder: Path, lengths: list[int], limits: list[int], cancelled: set[int], when: int
) -> None:
    inside = engine(folder)
    rows = [
        sequence(n, tuple(range(3, 3 + length)), max_tokens=limits[n])
        for n, length in enumerate(lengths)
    ]
    inside.admit("first", rows[::2])
    answers: dict[int, Generation] = {}
    steps = 0
    while inside.has_work or steps <= when:
        if steps == when:
            inside.admit("second", rows[1::2])
            for id_ in cancelled:
                inside.cancel(id_)
        answers |= {each.sequence_id: each for each in inside.step()}
        steps += 1

    stats = {each.batch_id: each for each in inside.take_stats()}
    assert answers.keys() == set(range(len(rows)))
    for batch_id, members in (("first", rows[::2]), ("second", rows[1::2])):
        shares = [answers[each.id].device_ns for each in members]
        assert sum(shares) == (stats[batch_id].device_ns if batch_id in stats else 0)
    assert not inside._engine.scheduler.requests  # nothing goes on inside


def test_a_cancelled_sequence_leaves_vllm_and_comes_back_with_what_it_has(folder: Path) -> None:
    inside = engine(folder)
    inside.admit("a", [sequence(1, (5, 6, 7, 8)), sequence(2, (9, 10))])
    inside.step()

    inside.cancel(1)
    answers, _ = run(inside)

    assert (answers[1].finish_reason, answers[1].token_ids) == (FinishReason.CANCELLED, [8])
    assert answers[2].finish_reason is FinishReason.STOP
    assert inside._engine.aborted == ["1"]


def test_a_stop_string_ends_a_sequence_inside_vllm_too(folder: Path) -> None:
    inside = engine(folder)
    prompt = inside._tokenizer.encode_text("abcdef")
    stop = inside._tokenizer.decode([prompt[-2]])

    inside.admit("a", [sequence(1, prompt, stop=(stop,), ignore_eos=True)])
    answers, _ = run(inside)

    assert answers[1].finish_reason is FinishReason.STOP
    assert answers[1].text == inside._tokenizer.decode([prompt[-1]])
    assert inside._engine.aborted == ["1"]


def test_tokens_of_a_stream_are_those_of_its_generation(folder: Path) -> None:
    inside = engine(folder)

    inside.admit("a", [sequence(1, (5, 6, 7), stream=True), sequence(2, (8, 9))])
    answers, new = run(inside)

    assert {each.sequence_id for each in new} == {1}
    assert [token for each in new for token in each.token_ids] == answers[1].token_ids
    assert "".join(each.text for each in new) == answers[1].text


def test_log_probabilities_name_the_chosen_token_and_the_likeliest(folder: Path) -> None:
    inside = engine(folder)

    inside.admit("a", [sequence(1, (5,), logprobs=2), sequence(2, (5,), logprobs=0)])
    answers, _ = run(inside)

    assert answers[1].logprobs is not None and answers[2].logprobs is not None
    first = answers[1].logprobs[0]
    assert (first.token_id, first.logprob) == (5, -0.5)
    assert first.top == ((1, -0.1), (2, -0.2))
    assert answers[2].logprobs[0].top == ()


def test_the_tokens_of_a_prompt_are_scored_from_the_second_on(folder: Path) -> None:
    inside = engine(folder)

    inside.admit("a", [sequence(1, (5, 6, 7), prompt_logprobs=1), sequence(2, (5, 6))])
    answers, _ = run(inside)

    scored = TokenLogprob(6, -0.7, ((1, -0.1),)), TokenLogprob(7, -0.7, ((1, -0.1),))
    assert answers[1].prompt_logprobs == [*scored]
    assert answers[2].prompt_logprobs is None


def test_what_vllm_refuses_fails_alone_and_is_not_quoted(folder: Path) -> None:
    inside = engine(folder)

    inside.admit(
        "a",
        [
            sequence(1, (5, 6)),
            sequence(2, (5, 6), grammar=Grammar("regex", "(")),
            sequence(3, (10**6,)),
            Sequence(4, (5, 6)),
            sequence(5, (5,), max_tokens=10**6),
            sequence(6, (5,), adapter="none-such"),
        ],
    )
    answers, _ = run(inside)

    assert answers.pop(1).finish_reason is FinishReason.STOP
    assert [answers[id_].error_code for id_ in range(2, 7)] == [
        "invalid_schema",
        "invalid_request",
        "invalid_request",
        "context_length_exceeded",
        "invalid_request",
    ]
    assert "unbalanced" not in str(answers[2].error_message)


def test_every_field_of_the_sampling_parameters_reaches_vllm(folder: Path) -> None:
    plain = SamplingParams(max_tokens=1)
    by_us = {"stop", "unset"}
    inside = engine(folder)

    def handed(params: SamplingParams) -> Any:
        """What vLLM was given, or our words if it was not."""
        LLMEngine.requests.clear()
        inside.admit("a", [Sequence(1, (5,), params)])
        inside.cancel(1)
        answers, _ = run(inside)
        given = LLMEngine.requests
        return dict(vars(given[0]["params"])) if given else answers[1].error_message

    # A field that is added to SamplingParams has to be handed over, or made good here.
    before = handed(plain)
    for field in dataclasses.fields(SamplingParams):
        value = getattr(FULL, field.name)
        assert value != getattr(plain, field.name), f"{field.name} is not tried"
        if field.name not in by_us:
            now = handed(dataclasses.replace(plain, **{field.name: value}))
            assert now != before, field.name
            assert isinstance(now, dict) or f"has no {field.name}" in now
    assert sampling.form(Grammar("regex", "a+")) == {"regex": "a+"}


def test_a_models_own_generation_settings_are_obeyed_or_refused_by_name(
    folder: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    rules = {"temperature": 0.3, "top_k": 7, "min_new_tokens": 3, "suppress_tokens": [9]}
    (own / "generation_config.json").write_text(json.dumps(rules))
    inside = engine(own)

    params = SamplingParams(max_tokens=5, top_k=2, unset=frozenset({"temperature"}))
    inside.admit("a", [Sequence(1, (5,), params)])

    given = LLMEngine.requests[-1]["params"]
    assert (given.temperature, given.top_k, given.min_tokens) == (0.3, 2, 3)
    assert given._bad_words_token_ids == [[9]]
    (own / "generation_config.json").write_text(json.dumps({"no_repeat_ngram_size": 2}))
    with pytest.raises(ConfigError, match="no_repeat_ngram_size, which the engine vllm does not"):
        engine(own)


def test_prefix_caches_do_not_cross_tenants_and_urgent_sequences_go_first(folder: Path) -> None:
    inside = engine(folder)

    inside.admit("a", [sequence(1, (5,), tenant="a"), sequence(2, (5,), tenant="b")])

    salts = [each["prompt"]["cache_salt"] for each in LLMEngine.requests]
    assert salts == ["a", "b"]
    assert LLMEngine.started[-1].scheduling_policy == "priority"


def test_an_adapter_goes_with_the_sequences_that_name_it(folder: Path, tmp_path: Path) -> None:
    adapters = {}
    for name, rank in (("miller", 16), ("baker", 4)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"r": rank}))
        adapters[name] = str(tmp_path / name)
    inside = engine(folder, adapters=adapters)

    inside.admit("a", [sequence(1, (5,), adapter="baker"), sequence(2, (5,))])

    assert LLMEngine.started[-1].max_lora_rank == 16
    assert [each["lora"] and each["lora"].lora_path for each in LLMEngine.requests] == [
        str(tmp_path / "baker"),
        None,
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"options": {"tensor_paralel_size": 2}}, "did you mean tensor_parallel_size"),
        ({"options": {"tensor_parallel_size": 2}}, "World size"),
        ({"adapters": {"a": "/nowhere"}}, "has no adapter_config.json"),
    ],
)
def test_engine_arguments_that_vllm_does_not_take_are_refused_at_start(
    folder: Path, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        engine(folder, **given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"options": {"max_num_seqs": 3}}, "own key max_batch_size"),
        ({"options": {"trust_remote_code": True}}, "cannot be chosen"),
        ({"options": {"python": 3}}, "is the interpreter of an environment"),
        ({"kind": "embed"}, "kind generate, not embed"),
    ],
)
def test_settings_that_no_vllm_could_take_are_refused_wherever_models_are_read(
    folder: Path, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        registry.check(model(folder, **given))


def test_adapters_of_another_engine_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="inflight runs no LoRA adapters; vllm does"):
        registry.check(model(folder, engine="inflight", adapters={"a": "/nowhere"}))


def test_a_vllm_that_is_too_old_or_of_another_device_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="is cuda:1, but this vLLM is built for CPU"):
        VllmEngine(folder, model(folder), "cuda:1", 0, lambda: None)
    fake_vllm.install(monkeypatch, version="0.9.2")
    with pytest.raises(ConfigError, match=r"needs vLLM 0.11 or newer; 0.9.2 is here"):
        engine(folder)


def test_an_interpreter_without_vllm_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)

    with pytest.raises(ConfigError, match=r"The engine vllm needs the module vllm, which .*python"):
        registry.create(
            "vllm", folder, model(folder), device="cpu", threads=0, progress=lambda: None
        )


def test_a_request_names_an_adapter_behind_its_model(folder: Path) -> None:
    adapted = model(folder, adapters={"miller": "/srv/miller"})
    known = Settings(models={"base": adapted})
    request = parse({"prompt": "x", "model": "base:miller"})

    assert known.model_name(request.kind, request.body.model) == "base"
    assert request.adapter == "miller"
    assert parse({"prompt": "x", "model": "base"}).adapter == ""
    for wrong in ("base:baker", "base:", ":miller", "base:miller:miller"):
        with pytest.raises(ModelNotFound):
            known.model_name(request.kind, wrong)


def test_what_only_workers_have_is_not_asked_of_the_api(folder: Path) -> None:
    elsewhere = model(folder, adapters={"a": "/gpu/a"}, options={"python": "/gpu/bin/python"})

    registry.check(elsewhere)

    assert registry.python_of(elsewhere) == "/gpu/bin/python"


def test_a_worker_says_which_interpreter_is_missing_and_which_models_do_not_go_together(
    folder: Path,
) -> None:
    def catalog(*pythons: str) -> dict[str, CatalogModel]:
        return {
            f"m{number}": CatalogModel(
                model(folder, options={"python": python}), folder, cast(Tokenizer, None)
            )
            for number, python in enumerate(pythons)
        }

    assert assembly._python(catalog(sys.executable, sys.executable)) == sys.executable
    with pytest.raises(ConfigError, match=r"Model m1: options\.python names no program"):
        assembly._python(catalog(sys.executable, "/no/python"))
    with pytest.raises(ConfigError, match="give each of these a worker of its own"):
        assembly._python(catalog(sys.executable, "/bin/sh"))
