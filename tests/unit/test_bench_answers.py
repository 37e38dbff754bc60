"""The measure of what a precision does to answers."""

from __future__ import annotations

import pytest
import torch

from app.bench.answers import Effect, Reading, answer, compare, load, read
from app.engines.base import Sequence
from app.jobs import SamplingParams
from tests.unit.inflight_tiny import engine_of, folder_of, run_all

PROMPTS = [tuple(range(3 + place, 20 + 9 * place)) for place in range(5)]


def test_reading_an_answer_finds_the_numbers_that_writing_it_had() -> None:
    # given answers written token by token, in company
    engine = engine_of("llama")
    params = SamplingParams(14, temperature=0.0, ignore_eos=True, logprobs=0)
    written = run_all(engine, [Sequence(i, prompt, params) for i, prompt in enumerate(PROMPTS)])
    answers = [written[place].token_ids for place in range(len(PROMPTS))]
    logprobs = [each.logprob for i in range(len(PROMPTS)) for each in written[i].logprobs or []]

    # when
    reading = read(engine, PROMPTS, answers)

    # then
    assert reading.likeliest.tolist() == [token for tokens in answers for token in tokens]
    assert reading.logprobs.tolist() == pytest.approx(logprobs, abs=1e-4)


def test_a_coarser_precision_is_found_to_differ() -> None:
    # given
    reference = load(folder_of("llama"), "float32", "cpu", rows=4)
    coarse = load(folder_of("llama"), "bfloat16", "cpu", rows=4)
    expected = answer(reference, PROMPTS, 14)

    # when
    same = compare(expected, expected, *[read(reference, PROMPTS, expected)] * 2)
    readings = read(reference, PROMPTS, expected), read(coarse, PROMPTS, expected)
    other = compare(expected, answer(coarse, PROMPTS, 14), *readings)

    # then
    assert same == Effect(1.0, None, 1.0, 0.0, 0.0)
    assert 0 < other.mean_logprob <= other.max_logprob


def test_texts_are_counted_up_to_their_first_difference() -> None:
    # given
    expected = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    found = [[1, 2, 3], [4, 5, 0], [0, 8, 9]]
    before = Reading(torch.tensor([-1.0, -2.0]), torch.tensor([5, 6]))
    after = Reading(torch.tensor([-1.5, -2.0]), torch.tensor([5, 7]))

    # when
    effect = compare(expected, found, before, after)

    # then
    assert effect == Effect(1 / 3, 1.0, 0.5, 0.25, 0.5)
