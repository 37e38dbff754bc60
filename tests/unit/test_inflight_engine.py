"""What the in-flight engine does with its rows, its cache, and with what is wrong."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from app.config.settings import ModelSettings
from app.engines.base import Generation, Sequence
from app.engines.inflight import library
from app.engines.inflight.engine import InflightEngine, _break_down
from app.engines.inflight.scheduler import Schedule
from app.errors import ConfigError
from app.jobs import FinishReason, Kind, SamplingParams
from tests.unit.inflight_tiny import (
    CONTEXT,
    VOCAB,
    again,
    engine_of,
    folder_of,
    greedy,
    reference,
    reference_model,
    run_all,
    run_out,
    segments_of,
)

_SYSTEM = tuple(range(2, 90))


def test_a_finished_row_leaves_at_once_and_the_next_takes_its_place() -> None:
    engine = engine_of("llama", rows=2)
    engine.admit("b", [greedy(1, [5, 6], 2), greedy(2, [7], 9), greedy(3, [8, 9], 9)])

    engine.step()
    assert engine.free_rows == 0
    assert [each.sequence_id for each in engine.step()] == [1]
    schedule = _next_schedule(engine)

    assert {segment.row.sequence.id for segment in schedule.segments} == {2, 3}


def test_an_engine_says_which_kernels_compute() -> None:
    compiled = library.library()

    said = engine_of("llama", rows=2).kernels

    kernels = f"compiled for {platform.machine()}: attention"
    assert said == (kernels if compiled else library.built().state)  # float32: layers are torch's


def test_a_long_prompt_shares_its_steps_with_those_who_decode() -> None:
    # given a row that decodes
    engine = engine_of("llama", prefill_tokens=20)
    engine.admit("b", [greedy(1, [5], 30)])
    engine.step()

    # when a prompt of 100 tokens comes
    engine.admit("c", [greedy(2, range(100 - VOCAB, 97 - 1), 2), greedy(3, [*range(90)] * 2, 1)])
    counts = []
    while any(each.generation.first_token_ns == 0 for each in engine._rows.values()):
        schedule = _next_schedule(engine)
        counts.append({each.row.sequence.id: each.count for each in schedule.segments})

    # then no step computes more than 20 tokens of prompts, and all of them go on decoding
    assert all(count[1] == 1 for count in counts)
    assert all(sum(count.values()) - 1 <= 20 + 1 for count in counts)
    assert len(counts) > 4


def test_prompts_that_arrive_together_compute_a_common_beginning_once() -> None:
    prompts = [(*_SYSTEM, place, place + 1, 2 * place) for place in range(3, 23)]
    engine = engine_of("llama", rows=8)

    generations = run_all(engine, [greedy(i, prompt, 3) for i, prompt in enumerate(prompts)])

    outputs_fed_back = 2 * len(prompts)
    computed = sum(stats.useful_tokens for stats in engine.take_stats()) - outputs_fed_back
    assert computed <= 1.05 * _trie_tokens(prompts)
    for i, prompt in enumerate(prompts):
        assert generations[i].token_ids == reference("llama", prompt, 3)
        assert generations[i].input_tokens == len(prompt)


def test_a_beginning_is_found_again_by_later_batches_of_its_tenant_alone() -> None:
    engine = engine_of("llama")
    run_all(engine, [greedy(1, (*_SYSTEM, 1), 1, tenant="a")])
    engine.take_stats()

    run_all(engine, [greedy(2, (*_SYSTEM, 2), 1, tenant="a")])
    assert [stats.useful_tokens for stats in engine.take_stats()] == [1]

    run_all(engine, [greedy(3, (*_SYSTEM, 2), 1, tenant="b")])
    assert [stats.useful_tokens for stats in engine.take_stats()] == [len(_SYSTEM) + 1]


@pytest.mark.parametrize("way", ["kernel", "portable", "ahead"])
def test_a_second_turn_computes_nothing_that_the_first_has_computed(way: str) -> None:
    # given an answer to a prompt
    engine = engine_of("llama", portable=way == "portable", ahead=again if way == "ahead" else None)
    prompt = tuple(range(2, 50))
    first = run_all(engine, [greedy(1, prompt, 45)])[1]
    engine.take_stats()

    # when it comes back as part of the next prompt
    turn = (*prompt, *first.token_ids, *range(60, 70))
    second = run_all(engine, [greedy(2, turn, 8)])[2]

    # then only what is new is computed, and the first answer's last token, which never was
    known = len(prompt) + len(first.token_ids) - 1
    assert (first.cached_tokens, second.cached_tokens) == (0, known)
    fed_back = 7
    assert sum(each.useful_tokens for each in engine.take_stats()) == 1 + 10 + fed_back
    assert second.token_ids == reference("llama", turn, 8)


def test_a_long_prompt_that_computes_no_number_is_not_shared_chunk_by_chunk() -> None:
    # given a token whose embedding is not a number, in the first of many chunks of a prompt
    engine = engine_of("llama", portable=True, prefill_tokens=32)
    stem = tuple(range(2, 80))
    expected = reference("llama", (*stem, 81), 4)
    embedding: Any = engine._model.get_input_embeddings()
    sound = embedding.weight.detach()[2].clone()
    embedding.weight.detach()[2] = float("nan")
    engine.admit("b", [greedy(1, (*stem, 80), 4)])
    engine.step()

    # when it turns out, and the token is mended
    failed = run_out(engine)[1]
    embedding.weight.detach()[2] = sound

    # then nobody begins with what was computed
    answer = run_all(engine, [greedy(2, (*stem, 81), 4)])[2]
    assert failed.error_code == "not_finite"
    assert (answer.cached_tokens, answer.token_ids) == (0, expected)


def test_the_youngest_row_of_the_lowest_priority_gives_way_and_ends_with_the_same_text() -> None:
    # given a cache of 5 blocks, and rows that will want 2 blocks each
    engine = engine_of("llama", rows=3, cache_tokens=5 * 32)
    prompts = {1: range(20), 2: range(30, 50), 3: range(60, 80)}
    engine.admit("b", [greedy(1, prompts[1], 30, priority=5)])
    engine.admit("b", [greedy(i, prompts[i], 30, priority=0) for i in (2, 3)])

    # when they grow
    lost: list[int] = []
    generations: dict[int, Generation] = {}
    while engine.has_work:
        before = {id_ for id_, row in engine._rows.items() if row.slot >= 0}
        ended = {each.sequence_id: each for each in engine.step()}
        after = {id_ for id_, row in engine._rows.items() if row.slot >= 0}
        lost += before - after - ended.keys()
        generations |= ended

    # then
    assert lost == [1]
    for i, prompt in prompts.items():
        assert generations[i].token_ids == reference("llama", tuple(prompt), 30)

    # and it tells how often and for how long
    told = {i: each.breakdown for i, each in generations.items() if each.breakdown}
    assert [told[i].preemptions for i in prompts] == [1, 0, 0]
    assert [told[i].preempted_ns > 0 for i in prompts] == [True, False, False]


def test_the_time_of_a_prompt_and_of_an_output_are_told_apart() -> None:
    generations = run_all(
        engine_of("llama", prefill_tokens=8), [greedy(1, range(40), 1), greedy(2, range(3), 30)]
    )

    prefill_ns = {i: each.breakdown.prefill_ns for i, each in generations.items() if each.breakdown}
    assert prefill_ns[1] == generations[1].device_ns  # its only token comes of its prompt
    assert 0 < prefill_ns[2] < generations[2].device_ns


def test_the_time_of_tokens_that_were_dropped_and_are_computed_again_is_told_apart() -> None:
    # given 20 tokens of a prompt and 10 of an output, of which 25 were computed before
    [segment] = segments_of([(0, 30)])
    segment.row.sequence = greedy(1, range(20), 30)
    segment.row.furthest = 25

    _break_down(segment, 3_000)

    told = segment.row.breakdown
    assert (told.recomputed_ns, told.prefill_ns) == (2_500, 0)  # and 500 for the output

    # and of which 12 were
    segment.row.furthest = 12
    _break_down(segment, 3_000)

    assert (told.recomputed_ns, told.prefill_ns) == (2_500 + 1_200, 800)


def test_a_row_that_gave_way_and_is_cancelled_tells_of_it() -> None:
    # given a row that has to give way
    engine = engine_of("llama", rows=2)
    engine.admit("b", [greedy(1, range(20), 30)])
    engine.step()
    assert engine._scheduler._preempt() is engine._rows[1]
    engine._scheduler._slots.clear()  # nor is there another place
    engine.step()

    # when it is cancelled
    engine.cancel(1)
    [generation] = run_out(engine).values()

    # then
    assert generation.breakdown is not None
    assert generation.breakdown.preemptions == 1
    assert generation.breakdown.preempted_ns > 0


def test_a_row_that_lost_its_place_goes_on_with_the_same_dice() -> None:
    # given an unseeded row, alone long enough to have drawn a seed
    engine = engine_of("llama", rows=1)
    params = SamplingParams(20, temperature=1.0, ignore_eos=True)
    engine.admit("b", [Sequence(1, (3, 4, 5), params)])
    for _ in range(8):
        engine.step()
    (row,) = engine._rows.values()
    seed = row.params.seed

    # when it is preempted
    assert engine._scheduler._preempt() is row
    (generation,) = run_out(engine).values()

    # then its text is that of its seed
    seeded = Sequence(2, (3, 4, 5), dataclasses.replace(params, seed=seed))
    assert run_all(engine_of("llama"), [seeded])[2].token_ids == generation.token_ids


def test_a_seed_gives_the_same_text_in_any_company() -> None:
    params = SamplingParams(12, temperature=1.0, top_p=0.9, seed=7, ignore_eos=True)
    alone = run_all(engine_of("qwen3"), [Sequence(1, (3, 4, 5), params)])[1]

    company = [
        Sequence(i, (i, 9), SamplingParams(6 + i, temperature=0.7, seed=i, ignore_eos=True))
        for i in range(2, 7)
    ]
    together = run_all(engine_of("qwen3", rows=3), [*company, Sequence(1, (3, 4, 5), params)])[1]

    assert together.token_ids == alone.token_ids


def test_log_probabilities_are_the_models_own() -> None:
    prompt = (3, 14, 15, 92)
    params = SamplingParams(4, temperature=0.0, logprobs=3, ignore_eos=True)

    generation = run_all(engine_of("llama"), [Sequence(1, prompt, params)])[1]

    tokens = torch.tensor([[*prompt, *generation.token_ids]])
    logits = reference_model("llama")(tokens).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, -1)
    assert generation.logprobs is not None
    for place, found in enumerate(generation.logprobs):
        assert found.token_id == generation.token_ids[place]
        assert found.logprob == pytest.approx(expected[place, found.token_id].item(), abs=1e-4)
        assert [token for token, _ in found.top] == expected[place].topk(3).indices.tolist()


def test_a_stop_string_ends_the_text_before_it() -> None:
    answer = reference("llama", (5, 6, 7), 12)
    stop = f"w{answer[4]} w{answer[5]}"  # begins in one token and ends in the next
    params = SamplingParams(12, temperature=0.0, stop=(stop,), ignore_eos=True)

    generation = run_all(engine_of("llama"), [Sequence(1, (5, 6, 7), params)])[1]

    assert generation.finish_reason is FinishReason.STOP
    assert generation.token_ids == answer[:6]
    assert generation.text.split() == [f"w{token}" for token in answer[:4]]


def test_a_cancelled_row_is_free_after_one_step_and_keeps_its_text() -> None:
    engine = engine_of("llama", rows=1)
    engine.admit("b", [greedy(1, [5, 6], 50), greedy(2, [7], 3)])
    for _ in range(4):
        engine.step()

    engine.cancel(1)
    (generation,) = engine.step()

    assert generation.finish_reason is FinishReason.CANCELLED
    assert generation.token_ids == reference("llama", (5, 6), 4)
    assert engine._rows[2].slot == 0


def test_a_sequence_cancelled_before_it_came_ends_without_a_token() -> None:
    engine = engine_of("llama")
    engine.cancel(1)
    generation = run_all(engine, [greedy(1, [5, 6], 50), greedy(2, [7], 2)])[1]
    assert generation.finish_reason is FinishReason.CANCELLED
    assert generation.token_ids == []


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "code", "words"),
    [
        ((), 4, "invalid_request", "no tokens"),
        ((1, VOCAB), 4, "invalid_request", f"run to {VOCAB - 1}"),
        ((1, -1), 4, "invalid_request", "out of range"),
        ((1,) * 100, CONTEXT, "context_length_exceeded", "100 tokens"),
    ],
)
def test_a_wrong_sequence_is_refused_and_its_mates_do_not_notice(
    prompt: tuple[int, ...], max_tokens: int, code: str, words: str
) -> None:
    engine = engine_of("llama")

    generations = run_all(engine, [greedy(1, prompt, max_tokens), greedy(2, [5, 6], 4)])

    assert generations[1].finish_reason is FinishReason.ERROR
    assert generations[1].error_code == code
    assert words in (generations[1].error_message or "")
    assert generations[2].token_ids == reference("llama", (5, 6), 4)


@pytest.mark.parametrize("portable", [False, True], ids=["kernel", "portable"])
def test_a_row_that_computes_no_number_fails_alone_and_leaves_nothing_behind(
    portable: bool,
) -> None:
    # given a token whose embedding is not a number, and which nobody else meets
    expected = {i: reference("llama", (i, 40), 40) for i in range(2, 7)}
    poison = min({*range(VOCAB)} - {40}.union(range(7), *expected.values()))
    engine = engine_of("llama", portable=portable, cache_tokens=8 * 32)
    embedding: Any = engine._model.get_input_embeddings()
    embedding.weight.detach()[poison] = float("nan")

    # when it runs beside another, and others get its blocks afterwards
    generations = run_all(engine, [greedy(1, [5, poison, 7], 9), greedy(2, [2, 40], 40)])
    generations |= run_all(engine, [greedy(i, [i, 40], 40) for i in range(3, 7)])

    # then
    failed = generations.pop(1)
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.error_code == "not_finite"
    assert {i: each.token_ids for i, each in generations.items()} == expected


def test_device_time_adds_up_to_the_nanosecond() -> None:
    engine = engine_of("llama", rows=3)
    engine.admit("x", [greedy(i, [i] * 40, 5 + i) for i in range(1, 4)])
    engine.admit("y", [greedy(i, [i] * 9, 3) for i in range(4, 7)])
    generations = run_out(engine)

    stats = {each.batch_id: each for each in engine.take_stats()}

    for batch, ids in {"x": (1, 2, 3), "y": (4, 5, 6)}.items():
        assert stats[batch].device_ns == sum(generations[i].device_ns for i in ids) > 0
    assert engine.take_stats() == []


def test_stamps_are_in_order() -> None:
    generation = run_all(engine_of("llama"), [greedy(1, [5, 6], 4)])[1]
    assert 0 < generation.started_ns <= generation.first_token_ns <= generation.finished_ns


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        (
            "t5",
            {"num_layers": 1, "d_model": 32, "d_ff": 32, "vocab_size": VOCAB},
            "encoder-decoder",
        ),
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
    ],
)
def test_a_model_that_would_be_wrong_is_refused_by_name(
    tmp_path: Path, family: str, changes: dict[str, Any], words: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from tests.unit.inflight_tiny import FAMILIES

    # given
    base = {} if family == "t5" else FAMILIES["llama"]
    config = AutoConfig.for_model(family, **{**base, **changes})
    kind = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    kind.from_config(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder_of("llama") / name, tmp_path)
    settings = ModelSettings(
        source="tiny", kind=Kind.GENERATE, engine="inflight", dtype="float32", context_tokens=192
    )
    if family == "llama":  # its own context is beyond what it was trained for
        file = tmp_path / "config.json"
        content = json.loads(file.read_text())
        content["rope_parameters"]["original_max_position_embeddings"] = 96
        file.write_text(json.dumps(content))

    # when, then
    with pytest.raises(ConfigError, match=words):
        InflightEngine(tmp_path, settings, "cpu", 1, lambda: None)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="no option cash_tokens"):
        engine_of("llama", cash_tokens=9)


def test_weights_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="weights of the engine inflight is full or int8"):
        engine_of("llama", weights="int3")


def _next_schedule(engine: InflightEngine) -> Schedule:
    """Step once; what was computed."""
    seen: list[Schedule] = []
    schedule = engine._scheduler.schedule

    def spy(budget: int) -> Schedule:
        seen.append(schedule(budget))
        return seen[-1]

    engine._scheduler.schedule = spy  # type: ignore[method-assign]
    engine.step()
    engine._scheduler.schedule = schedule  # type: ignore[method-assign]
    return seen[0]


def _trie_tokens(prompts: list[tuple[int, ...]]) -> int:
    return len({prompt[: length + 1] for prompt in prompts for length in range(len(prompt))})
