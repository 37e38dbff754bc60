"""What a model's generation_config.json says is obeyed, as by `generate`, or refused by name."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from app.config.settings import ModelSettings
from app.engines.base import Engine, Generation, Sequence
from app.engines.checkpoint import generation_config
from app.engines.checkpoint.generation_config import GenerationRules, load_rules
from app.engines.inflight.engine import InflightEngine
from app.engines.sampling.sampler import RowSampler
from app.engines.text.tokenizer import FileTokenizer
from app.errors import ConfigError
from app.jobs import Grammar, Kind, SamplingParams
from tests.unit import tiny_models
from tests.unit.inflight_tiny import again, run_ahead
from tests.unit.tiny_models import EOS, PAD, load

PROMPTS = [tuple(b"the mill wheel"), (7,), (65, 66, 65, 66, 65)]


def written(folder: Path, **fields: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return folder


def read(folder: Path, engine: str = "inflight", **settings: Any) -> GenerationRules:
    given = ModelSettings(source=str(folder), kind=Kind.GENERATE, engine=engine, **settings)
    return load_rules(folder, given)


def test_every_field_that_transformers_knows_is_obeyed_refused_or_without_effect() -> None:
    known = {
        *generation_config.OBEYED,
        *generation_config.REFUSED,
        *generation_config.BEAMS,
        *generation_config.WITHOUT_EFFECT,
    }

    assert set(vars(GenerationConfig())) - known <= {"_original_object_hash"}  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "field",
    [
        {"num_beams": 4, "length_penalty": 2.0},
        {"diversity_penalty": 0.5},
        {"penalty_alpha": 0.6},
        {"typical_p": 0.9},
        {"epsilon_cutoff": 3e-4},
        {"eta_cutoff": 3e-4},
        {"encoder_repetition_penalty": 1.2},
        {"encoder_no_repeat_ngram_size": 3},
        {"exponential_decay_length_penalty": [10, 1.1]},
        {"guidance_scale": 1.5},
        {"watermarking_config": {"bias": 2.0}},
        {"force_words_ids": [[3]]},
    ],
)
@pytest.mark.parametrize("engine", ["inflight", "generate"])
def test_what_no_engine_does_is_refused_by_name_unless_the_models_settings_leave_it_aside(
    tmp_path: Path, field: dict[str, Any], engine: str
) -> None:
    folder = written(tmp_path, eos_token_id=2, **field)

    for name, value in field.items():
        with pytest.raises(ConfigError, match=rf"{name} = .*engine {engine} does not do"):
            read(folder, engine)
        assert value

    assert read(folder, engine, generation_config="none") == GenerationRules()


def test_values_that_ask_for_nothing_are_taken(tmp_path: Path) -> None:
    folder = written(
        tmp_path,
        num_beams=1,
        length_penalty=1.0,
        early_stopping=True,  # says how beams end, and there are none
        typical_p=1.0,
        penalty_alpha=None,
        diversity_penalty=0.0,
        encoder_no_repeat_ngram_size=0,
        chat_format="chatml",  # transformers does not know it either
    )

    assert read(folder).defaults == {}


def test_an_older_models_config_speaks_where_there_is_no_file_of_its_own(tmp_path: Path) -> None:
    config = {"no_repeat_ngram_size": 3, "do_sample": False, "top_k": 50, "min_length": 56}
    (tmp_path / "config.json").write_text(json.dumps(config))

    rules = read(tmp_path)

    assert (rules.no_repeat_ngram_size, rules.min_length, rules.defaults) == (3, 56, {})


def test_a_file_that_makes_no_sense_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"generation_config.json cannot be read"):
        read(written(tmp_path, suppress_tokens="all"))


def test_a_request_that_does_not_say_how_to_sample_leaves_it_to_the_model(tmp_path: Path) -> None:
    rules = read(
        written(tmp_path, do_sample=True, temperature=0.6, top_p=0.9, top_k=20, eos_token_id=2)
    )
    unset = frozenset({"temperature", "top_p", "top_k", "min_p", "repetition_penalty"})

    assert rules.merged(SamplingParams(5, unset=unset)) == SamplingParams(
        5, temperature=0.6, top_p=0.9, top_k=20, unset=unset
    )
    said = SamplingParams(5, temperature=1.0, top_p=1.0, unset=unset - {"temperature", "top_p"})
    assert (rules.merged(said).temperature, rules.merged(said).top_p) == (1.0, 1.0)
    assert rules.merged(said).top_k == 20


def test_a_model_that_says_it_does_not_sample_is_greedy_unless_asked_otherwise(
    tmp_path: Path,
) -> None:
    rules = read(written(tmp_path, do_sample=False))

    assert rules.merged(SamplingParams(5, unset=frozenset({"temperature"}))).temperature == 0
    assert rules.merged(SamplingParams(5, temperature=0.8)).temperature == 0.8


def test_a_models_stop_strings_end_its_answers_too(tmp_path: Path) -> None:
    rules = read(written(tmp_path, stop_strings=["###"]))

    assert rules.merged(SamplingParams(5, stop=("x",))).stop == ("x", "###")


# ── as `generate` does ──────────────────────────────────────────────────────────────────────────

WIDTH, END, START = 40, 39, 0
tokens = st.integers(0, WIDTH - 1)
some = st.lists(tokens, max_size=25)
fields_of_rules = st.fixed_dictionaries(
    {"eos_token_id": st.just(END) | st.just([END, 5])},
    optional={
        "suppress_tokens": some,
        "begin_suppress_tokens": some,
        "bad_words_ids": st.lists(
            st.lists(tokens, min_size=1, max_size=3), min_size=1, max_size=20
        ),
        "sequence_bias": st.lists(
            st.tuples(st.lists(tokens, min_size=1, max_size=2), st.sampled_from([-9.5, -1.0, 4.0])),
            min_size=1,
            max_size=20,
            unique_by=lambda pair: tuple(pair[0]),
        ).map(lambda pairs: [list(pair) for pair in pairs]),
        "no_repeat_ngram_size": st.integers(1, 4),
        "min_length": st.integers(0, 12),
        "min_new_tokens": st.integers(0, 8),
        "forced_bos_token_id": tokens,
        "forced_eos_token_id": st.just(END),
    },
)


@given(
    fields=fields_of_rules,
    prompt=st.just([START]) | st.lists(tokens, min_size=1, max_size=12),
    penalty=st.sampled_from([1.0, 0.7, 1.5]),
    seed=st.integers(0, 9999),
)
@example(  # what came before raises a token that is penalised, too
    fields={"eos_token_id": END, "suppress_tokens": [], "sequence_bias": [[[27, 1], 4.0]]},
    prompt=[0],
    penalty=1.5,
    seed=2048,
)
@settings(max_examples=200, deadline=None)
def test_a_models_rules_leave_the_token_that_generate_takes(
    fields: dict[str, Any], prompt: list[int], penalty: float, seed: int
) -> None:
    # given a row of few, near and repeating logits, and what transformers makes of the rules
    num_steps = 8
    forced = {fields.get("forced_bos_token_id"), fields.get("forced_eos_token_id")}
    suppressed = fields.get("suppress_tokens", [])  # transformers refuses to force one of these
    fields |= {"suppress_tokens": [token for token in suppressed if token not in forced]}
    params = SamplingParams(num_steps, temperature=0.0, repetition_penalty=penalty)
    ends = fields["eos_token_id"]
    rules = generation_config.rules_of(fields)
    sampler = RowSampler(2, WIDTH, "cpu", rules, [ends] if isinstance(ends, int) else ends)
    output: list[int] = []
    sampler.put(1, params, prompt, output)
    processors = processors_of(fields, prompt, num_steps, penalty)
    generator = torch.Generator().manual_seed(seed)

    for _ in range(num_steps):
        # when a token is chosen from what both see
        logits = torch.randn(1, WIDTH, generator=generator) * 2
        expected = processors(torch.tensor([prompt + output]), logits.clone())[0]
        token = int(sampler.sample(logits, sampler.plan([1])).tokens)

        # then it is the one that is left, if any is
        if expected.max() > -torch.inf:
            assert token == int(expected.argmax())
        output.append(token)


def processors_of(fields: dict[str, Any], prompt: list[int], num_steps: int, penalty: float) -> Any:
    """What `generate` would run for a prompt of a decoder."""
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        **{name: value for name, value in fields.items() if value != []},
        max_length=len(prompt) + num_steps,
        repetition_penalty=penalty,
    )
    if config.min_new_tokens is not None:
        config.min_length = config.min_new_tokens + len(prompt)
    config._eos_token_tensor = torch.tensor(fields["eos_token_id"]).reshape(-1)
    return tiny_model()._get_logits_processor(
        config,
        input_ids_seq_length=len(prompt),
        encoder_input_ids=torch.tensor([prompt]),
        device="cpu",
    )


@functools.cache
def tiny_model() -> LlamaForCausalLM:
    sizes = dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"), 8
    )
    return LlamaForCausalLM(LlamaConfig(vocab_size=WIDTH, num_hidden_layers=1, **sizes))


@pytest.mark.parametrize("engine", ["inflight", "ahead", "generate", "t5"])
def test_an_engine_obeys_its_models_file_as_generate_does(engine: str, tmp_path: Path) -> None:
    # given a model that may not repeat, begin, end or go on as it would
    t5 = engine == "t5"
    folder = (tiny_models.save_t5 if t5 else tiny_models.save_llama)(tmp_path / "model")
    kind: Any = AutoModelForSeq2SeqLM if t5 else AutoModelForCausalLM
    plain = generated(kind, folder, 16)
    fields = {
        "eos_token_id": [EOS, plain[0][3], plain[1][2]],
        "pad_token_id": PAD,
        "suppress_tokens": plain[0][5:7],
        "begin_suppress_tokens": [plain[0][0], plain[1][0]],
        "bad_words_ids": [plain[0][1:3], plain[2][1:3], [plain[1][4]]],
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 9,
        "repetition_penalty": 1.3,
        "forced_eos_token_id": EOS,
    }
    if t5:
        fields |= {"decoder_start_token_id": PAD, "forced_bos_token_id": 100}
    written(folder, **fields)

    # when
    answers = run(made(folder, engine), 16)

    # then
    assert answers == generated(kind, folder, 16)
    assert answers != plain


@pytest.mark.parametrize("engine", ["inflight", "ahead", "generate"])
def test_logits_may_be_wider_than_the_tokenizers_vocabulary(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a model whose output is padded beyond what its tokenizer knows
    folder = tiny_models.save_llama(tmp_path / "model", vocab_size=400)
    known = tiny_models.VOCAB - 1
    fewer = property(lambda _: known, lambda *_: None)
    monkeypatch.setattr(FileTokenizer, "vocab_size", fewer, raising=False)
    inside = made(folder, engine)

    # when rows have a grammar, penalties, biases and log probabilities
    params = [
        SamplingParams(6, temperature=0.0, grammar=Grammar("regex", "[ab]{5}")),
        SamplingParams(6, temperature=0.0, repetition_penalty=1.5, ignore_eos=True),
        SamplingParams(6, temperature=0.0, logit_bias=((399, 100.0),), ignore_eos=True),
        SamplingParams(6, temperature=1.0, seed=3, logprobs=20, ignore_eos=True),
    ]
    inside.admit("batch", [Sequence(i, (65, 66), each) for i, each in enumerate(params)])
    found: dict[int, Generation] = {}
    while inside.has_work:
        found.update({each.sequence_id: each for each in inside.step()})

    # then each of them has its answer
    assert [each.error_code for each in found.values()] == [None] * 4
    assert re.fullmatch("[ab]{5}", found[0].text)
    assert found[2].token_ids == [399] * 6
    assert [len(each.top) for each in found[3].logprobs or ()] == [20] * 6


def made(folder: Path, engine: str) -> Engine:
    if engine != "ahead":
        return load(folder, "generate" if engine == "t5" else engine)
    inflight = load(folder, "inflight")
    assert isinstance(inflight, InflightEngine)
    return run_ahead(inflight, again)


def run(engine: Engine, max_tokens: int) -> list[list[int]]:
    unset = frozenset({"repetition_penalty"})
    params = SamplingParams(max_tokens, temperature=0.0, unset=unset)
    engine.admit("batch", [Sequence(i, prompt, params) for i, prompt in enumerate(PROMPTS)])
    found: dict[int, Generation] = {}
    while engine.has_work:
        found.update({each.sequence_id: each for each in engine.step()})
    assert all(each.error_code is None for each in found.values())
    return [found[i].token_ids for i in range(len(PROMPTS))]


def generated(kind: Any, folder: Path, max_tokens: int) -> list[list[int]]:
    """What transformers answers to each prompt alone, with the folder's own settings."""
    model = kind.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False)[
            0
        ].tolist()
        answers.append(out[1:] if model.config.is_encoder_decoder else out[len(prompt) :])
    return answers
