"""Each row is sampled by its own parameters, whatever else is in the batch."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.engines.base import TokenLogprob
from app.engines.sampling.draws import uniform
from app.engines.sampling.sampler import BAD_ROW, RowSampler, Sampled
from app.jobs import SamplingParams

VOCAB = 1000  # not a multiple of the blocks that rows are searched in
DRAWS = 4000


def params(**given: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 100} | given)


def sampler(*rows: SamplingParams, prompt: tuple[int, ...] = (1, 2)) -> RowSampler:
    made = RowSampler(len(rows), VOCAB, "cpu")
    for slot, each in enumerate(rows):
        made.put(slot, each, prompt)
    return made


def sample(logits: Tensor, *rows: SamplingParams, prompt: tuple[int, ...] = (1, 2)) -> Sampled:
    made = sampler(*rows, prompt=prompt)
    return made.sample(logits, made.plan(range(len(rows))))


def random_logits(num_rows: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, VOCAB, generator=generator) * spread


def frequencies(logits: Tensor, **given: Any) -> Tensor:
    """How often each token is drawn from one row of logits, over many seeds."""
    rows = [params(seed=seed, **given) for seed in range(DRAWS)]
    tokens = sample(logits.expand(DRAWS, -1), *rows).tokens
    return torch.bincount(tokens, minlength=VOCAB) / DRAWS


def assert_like(found: Tensor, expected: Tensor) -> None:
    """Within six standard deviations, or four draws of what is rare; the impossible never."""
    assert not found[expected == 0].any()
    deviation = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((found - expected).abs() <= 6 * deviation + 4 / DRAWS).all()


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    logits = random_logits(3)
    logits[2] = 0.0

    tokens = sample(logits, *[params(temperature=0)] * 3).tokens

    assert tokens.tolist() == [*logits[:2].argmax(-1).tolist(), 0]


@pytest.mark.parametrize("vocab", [1, 7, 255, 256, 257, 512, 49_153])
def test_greedy_is_right_for_any_size_of_vocabulary(vocab: int) -> None:
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab))
    made = RowSampler(5, vocab, "cpu")
    for slot in range(5):
        made.put(slot, params(temperature=0), (0,))

    for values in (logits, logits.bfloat16()):
        tokens = made.sample(values, made.plan(range(5))).tokens
        assert tokens.tolist() == values.float().argmax(-1).tolist()


def test_draws_follow_the_probabilities_of_the_model() -> None:
    logits = random_logits(1)[0]

    assert_like(frequencies(logits), torch.softmax(logits, -1))


def test_temperature_flattens_or_sharpens() -> None:
    logits = random_logits(1)[0]

    assert_like(frequencies(logits, temperature=0.5), torch.softmax(logits / 0.5, -1))
    assert_like(frequencies(logits, temperature=2.0), torch.softmax(logits / 2.0, -1))


def kept(logits: Tensor, keep: Tensor) -> Tensor:
    probs = torch.softmax(logits, -1) * keep
    return probs / probs.sum()


def test_top_k_draws_from_the_k_likeliest() -> None:
    logits = random_logits(1)[0]
    keep = torch.zeros(VOCAB)
    keep[logits.topk(5).indices] = 1

    assert_like(frequencies(logits, top_k=5), kept(logits, keep))


@pytest.mark.parametrize("spread", [3.0, 0.3])
def test_top_p_draws_from_the_smallest_set_that_reaches_it(spread: float) -> None:
    # A spread of 0.3 is nearly flat: its set is wider than the first candidates looked at.
    logits = random_logits(1, spread=spread)[0]
    probs, order = torch.softmax(logits, -1).sort(descending=True)
    size = int((probs.cumsum(-1) < 0.8).sum()) + 1
    keep = torch.zeros(VOCAB)
    keep[order[:size]] = 1

    assert_like(frequencies(logits, top_p=0.8), kept(logits, keep))


def test_top_p_counts_within_top_k() -> None:
    logits = torch.full((VOCAB,), -20.0)
    logits[:4] = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    keep = torch.zeros(VOCAB)
    keep[:1] = 1  # 0.4 / 0.7 of the two likeliest is past a half already

    assert_like(frequencies(logits, top_k=2, top_p=0.5), kept(logits, keep))


def test_min_p_drops_what_is_far_less_likely_than_the_likeliest() -> None:
    logits = random_logits(1)[0]
    probs = torch.softmax(logits / 1.5, -1)

    found = frequencies(logits, min_p=0.1, temperature=1.5)

    assert_like(found, kept(logits / 1.5, (probs >= 0.1 * probs.max()).float()))


@given(
    st.lists(
        st.builds(
            params,
            temperature=st.sampled_from([0.0, 0.7, 1.0, 2.0]),
            top_p=st.sampled_from([0.3, 0.95, 1.0]),
            top_k=st.sampled_from([0, 1, 40, 300, 999]),
            min_p=st.sampled_from([0.0, 0.05]),
            frequency_penalty=st.sampled_from([0.0, 0.5]),
            repetition_penalty=st.sampled_from([1.0, 1.3]),
            logprobs=st.sampled_from([None, 0, 3]),
            seed=st.integers(-(2**63), 2**63 - 1),
        ),
        min_size=2,
        max_size=6,
    ),
    st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_a_row_draws_the_same_alone_and_in_any_company(
    rows: list[SamplingParams], seed: int
) -> None:
    steps = [random_logits(len(rows), seed * 10 + step) for step in range(3)]

    together = sampler(*rows)
    crowd = [together.sample(logits, together.plan(range(len(rows)))) for logits in steps]

    for place, row in enumerate(rows):
        single = sampler(row)
        plan = single.plan([0])
        for logits, sampled in zip(steps, crowd, strict=True):
            alone = single.sample(logits[place : place + 1], plan)
            assert alone.tokens.item() == sampled.tokens[place].item()


def test_rows_keep_their_draws_when_others_come_and_go() -> None:
    rows = [params(seed=seed, top_p=0.9) for seed in range(4)]
    steps = [random_logits(4, step) for step in range(4)]
    still = sampler(*rows)
    undisturbed = [still.sample(each, still.plan(range(4))).tokens[2].item() for each in steps]

    moving = sampler(*rows)
    crowds = [[0, 1, 2, 3], [3, 2], [2], [2, 0, 1]]
    seen = [
        moving.sample(each[crowd], moving.plan(crowd)).tokens[crowd.index(2)].item()
        for each, crowd in zip(steps, crowds, strict=True)
    ]

    assert seen == undisturbed


@pytest.mark.parametrize("given_seed", [None, 5])
def test_an_interrupted_row_goes_on_where_it_was(given_seed: int | None) -> None:
    row = params(seed=given_seed, frequency_penalty=1.0, repetition_penalty=1.2)
    steps = [random_logits(1, step) for step in range(6)]
    whole = sampler(row)
    plan = whole.plan([0])
    tokens = [int(whole.sample(each, plan).tokens) for each in steps]

    resumed = RowSampler(3, VOCAB, "cpu")
    seeded = params(seed=whole.seed_of(0), frequency_penalty=1.0, repetition_penalty=1.2)
    resumed.put(1, seeded, (1, 2), tokens[:3])
    rest = [int(resumed.sample(each, resumed.plan([1])).tokens) for each in steps[3:]]

    assert rest == tokens[3:]


def test_rows_without_a_seed_differ() -> None:
    logits = torch.zeros(20, VOCAB)

    tokens = sample(logits, *[params()] * 20).tokens

    assert len(set(tokens.tolist())) > 10


def test_penalties_follow_their_definitions() -> None:
    # given a row that has put out 3, 3 and 4 after the prompt 1, 2
    made = RowSampler(1, VOCAB, "cpu")
    row = params(
        temperature=0, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25
    )
    made.put(0, row, (1, 2), (3, 3, 4))
    logits = torch.full((1, VOCAB), -50.0)
    logits[0, :6] = torch.tensor([3.3, 8.0, -1.0, 10.0, 9.0, 3.4])

    # when the likeliest is taken step by step, and then made impossible
    order = []
    for _ in range(5):
        token = int(made.sample(logits, made.plan([0])).tokens)
        order.append(token)
        logits[0, token] = -1000.0

    # then 1 → 4, 2 → -2, 3 → 5 - 2·0.5 - 0.25 = 3.75, 4 → 4.5 - 0.5 - 0.25 = 3.75
    assert order == [1, 3, 4, 5, 0]


def test_a_token_is_penalised_as_soon_as_it_is_put_out() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [7, 8, 9]] = torch.tensor([3.0, 2.5, 2.2])
    made = sampler(params(temperature=0, presence_penalty=1.0))
    plan = made.plan([0])

    assert [int(made.sample(logits, plan).tokens) for _ in range(4)] == [7, 8, 9, 7]


def test_a_penalised_row_changes_nothing_for_its_mates() -> None:
    logits = random_logits(2)
    before = logits.clone()

    tokens = sample(
        logits, params(temperature=0), params(temperature=0, repetition_penalty=5.0)
    ).tokens

    assert tokens[0] == before[0].argmax()
    assert torch.equal(logits, before)


def test_log_probabilities_are_of_the_model_before_any_change() -> None:
    logits = random_logits(3)
    rows = [
        params(temperature=0),
        params(temperature=0.3, top_k=2, seed=1, logprobs=3),
        params(temperature=0, repetition_penalty=3.0, logprobs=0),
    ]

    sampled = sample(logits, *rows)

    expected = torch.log_softmax(logits, -1)
    found = sampled.logprobs()
    assert set(found) == {1, 2}
    for place, each in found.items():
        assert each.token_id == sampled.tokens[place]
        assert each.logprob == pytest.approx(expected[place, each.token_id].item(), abs=1e-5)
    assert [token for token, _ in found[1].top] == expected[1].topk(3).indices.tolist()
    assert found[2] == TokenLogprob(found[2].token_id, found[2].logprob, ())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_fails_and_its_mates_do_not_notice(value: float) -> None:
    rows = [params(seed=seed, top_p=0.9, presence_penalty=0.1, logprobs=1) for seed in range(3)]
    logits = random_logits(3)
    clean = sample(logits, *rows)

    logits[1, 400] = value
    dirty = sample(logits, *rows)

    assert dirty.tokens.tolist() == [clean.tokens[0], BAD_ROW, clean.tokens[2]]
    assert dirty.logprobs()[0] == clean.logprobs()[0]


def test_a_row_without_a_possible_token_fails() -> None:
    logits = torch.full((1, VOCAB), float("-inf"))

    assert sample(logits, params(seed=1)).tokens.tolist() == [BAD_ROW]


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((VOCAB,), float("-inf"))
    logits[[3, 700]] = 0.0

    assert set(frequencies(logits, temperature=2.0).nonzero()[:, 0].tolist()) == {3, 700}


def test_noise_is_even_and_unlike_its_neighbours() -> None:
    grid = 200
    seeds = torch.arange(grid).repeat_interleave(grid)
    positions = torch.arange(grid).repeat(grid)

    noise = uniform(seeds, positions)

    assert (noise >= 0).all()
    assert (noise < 1).all()
    counts = torch.histc(noise, bins=20, min=0, max=1)
    assert (counts - grid * grid / 20).abs().max() < 6 * math.sqrt(grid * grid / 20)
    assert len(noise.unique()) == len(noise)
    table = noise.reshape(grid, grid)
    for shifted in (table.roll(1, 0), table.roll(1, 1), table.T):
        correlation = torch.corrcoef(torch.stack([table.flatten(), shifted.flatten()]))[0, 1]
        assert abs(correlation) < 6 / grid


def test_a_slot_that_was_not_filled_is_an_error() -> None:
    with pytest.raises(LookupError, match="slot 1"):
        RowSampler(2, VOCAB, "cpu").plan([1])


@pytest.mark.parametrize("seed", [2**63, 2**63 - 1, -(2**63) - 1, 10**40])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    logits = random_logits(1)

    first, second = (sample(logits, params(seed=seed)).tokens for _ in range(2))

    assert first.equal(second)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("top_p", [1e-50, 5e-324, 1e-45, 1e-9])
def test_a_top_p_that_is_nothing_in_float32_leaves_the_likeliest_token(
    top_p: float, top_k: int
) -> None:
    logits = random_logits(3)

    drawn = sample(logits, *[params(top_p=top_p, top_k=top_k, seed=seed) for seed in range(3)])

    assert drawn.tokens.equal(logits.argmax(-1))


tiny = st.sampled_from([5e-324, 1e-300, 1e-50, 1e-46, 1e-40, 1e-38, 1e-5, 1e-4])


@settings(max_examples=200, deadline=None)
@given(
    temperature=st.floats(0, 2) | tiny,
    top_p=st.floats(0, 1, exclude_min=True) | tiny,
    min_p=st.floats(0, 1) | tiny,
    repetition_penalty=st.floats(0, 10, exclude_min=True) | tiny,
    frequency_penalty=st.floats(-2, 2) | tiny,
    presence_penalty=st.floats(-2, 2) | tiny,
    top_k=st.integers(0, 2**31 - 1) | st.integers(0, 3),
    seed=st.integers() | st.none(),
    logit_bias=st.lists(st.tuples(st.integers(0, 2 * VOCAB), st.floats(-100, 100)), max_size=9).map(
        tuple
    ),
    bad_words=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)).map(tuple)
    | st.just(tuple((token,) for token in range(VOCAB))),
    min_tokens=st.integers(0, 5),
    stop_token_ids=st.lists(st.integers(0, 2 * VOCAB), max_size=3).map(tuple),
    spread=st.sampled_from([0.0, 1e-6, 3.0, 1e4]),
)
def test_whatever_a_request_may_say_a_token_comes(spread: float, **given: Any) -> None:
    # given a row with the strangest parameters, among ordinary ones
    rows = [params(temperature=0.0), params(**given), params(seed=1)]
    made = sampler(*rows)

    # when it is sampled for a while
    for step in range(3):
        logits = random_logits(3, seed=step, spread=spread)
        tokens = made.sample(logits, made.plan(range(3))).tokens

        # then every row has a token
        assert ((tokens >= 0) & (tokens < VOCAB)).all()


def test_a_token_that_cannot_come_has_a_log_probability_that_json_can_hold() -> None:
    logits = random_logits(1)
    logits[0, 3:] = -math.inf

    found = sample(logits, params(temperature=0, logprobs=20)).logprobs()[0]

    assert len(found.top) == 20
    assert all(math.isfinite(logprob) for _, logprob in found.top)


def test_a_bias_raises_or_lowers_a_tokens_logit_before_penalties() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 3.0
    row = params(temperature=0, logit_bias=((8, 2.0), (9, 3.5), (7, -1.0)))
    bent = params(temperature=0, logit_bias=((8, 2.0), (9, 3.5)), repetition_penalty=2.0)

    assert sample(logits, row).tokens.tolist() == [9]
    assert sample(logits, bent, prompt=(9,)).tokens.tolist() == [7]  # 3.5 / 2 is less than 3


def test_a_bias_of_minus_a_hundred_is_as_good_as_a_ban_and_leaves_its_mates_alone() -> None:
    logits = random_logits(2)
    likeliest = logits.argmax(-1).tolist()

    banned = params(temperature=0, logit_bias=tuple((token, -100.0) for token in range(900)))
    tokens = sample(logits, banned, params(temperature=0)).tokens.tolist()

    assert tokens == [900 + int(logits[0, 900:].argmax()), likeliest[1]]


def test_bad_words_never_come_whatever_of_them_came_before_or_in_the_prompt() -> None:
    # given a model that would say 5 6 7 for ever, after a prompt that ends in 4
    logits = torch.zeros(1, VOCAB)
    logits[0, [5, 6, 7]] = torch.tensor([3.0, 2.0, 1.0])
    output: list[int] = []
    made = RowSampler(1, VOCAB, "cpu")
    words = ((4, 5), (5, 5), (6, 5, 6), (7,))
    made.put(0, params(temperature=0, bad_words=words), (1, 4), output)

    # when
    for _ in range(5):
        token = int(made.sample(logits, made.plan([0])).tokens)
        output.append(token)

    # then 5 is not first, nor twice running; 6 5 is not followed by 6; 7 never comes
    assert output == [6, 5, 0, 5, 6]


def test_an_output_does_not_end_before_it_has_its_least_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [5, 6, 7]] = torch.tensor([3.0, 2.0, 1.0])
    made = RowSampler(2, VOCAB, "cpu", eos_token_ids={5})
    made.put(0, params(temperature=0, min_tokens=3, stop_token_ids=(6,)), (1,))
    made.put(1, params(temperature=0, min_tokens=2, ignore_eos=True), (1,))

    steps = [made.sample(logits.expand(2, -1), made.plan([0, 1])).tokens.tolist() for _ in range(5)]

    assert [token for token, _ in steps] == [7, 7, 7, 5, 5]
    assert [token for _, token in steps] == [5] * 5  # what ends nothing is not held back


def test_a_row_with_a_least_length_goes_on_where_it_was_interrupted() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = 1.0
    made = RowSampler(1, VOCAB, "cpu", eos_token_ids={5})
    made.put(0, params(temperature=0, min_tokens=3), (1,), [8, 8])

    tokens = [int(made.sample(logits, made.plan([0])).tokens) for _ in range(3)]

    assert tokens == [0, 5, 5]


class Only:
    """Allows two tokens; stands for a compiled grammar."""

    def fill(self, mask: Any) -> None:
        mask[:] = 0
        mask[0] = 1 << 3 | 1 << 4

    def take(self, token_id: int) -> bool:
        return False


def test_where_a_grammar_allows_nothing_but_what_is_forbidden_the_grammar_holds() -> None:
    made = RowSampler(1, VOCAB, "cpu")
    matcher: Any = Only()
    made.put(0, params(temperature=0, bad_words=((3,), (4,))), (1,), matcher=matcher)
    logits = random_logits(1)
    logits[0, 4] = 1 + logits[0, 3]

    assert made.sample(logits, made.plan([0])).tokens.tolist() == [4]


def test_a_mask_of_fewer_tokens_than_there_are_logits_forbids_the_others() -> None:
    made = RowSampler(1, VOCAB, "cpu")
    matcher: Any = Only()
    made.put(0, params(temperature=0), (1,), matcher=matcher)
    logits = torch.zeros(1, VOCAB)
    logits[0, -1] = 9.0

    assert made.sample(logits, made.plan([0])).tokens.tolist() == [3]


def test_what_penalties_cost_is_bounded_by_the_rows_that_are_present() -> None:
    # given a row with a long prompt that has left, and its mates
    made = RowSampler(3, VOCAB, "cpu")
    row = params(temperature=0, frequency_penalty=0.5)
    made.put(0, row, range(900))
    made.put(1, row, (1, 2))
    made.put(2, row, (3,))
    for _ in range(3):
        made.sample(random_logits(3), made.plan([0, 1, 2]))

    # when those who stay are looked at
    _, tokens, _ = made._seen.of(np.array([1, 2]))

    # then it is no more than they have seen
    assert len(tokens) == 2 + 1 + 2 * 3


def test_a_step_without_memory_for_its_penalties_can_be_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = RowSampler(1, VOCAB, "cpu")
    row = params(temperature=0, presence_penalty=1.0)

    def refuse(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    for name in ("zeros", "cat", "tensor"):
        with monkeypatch.context() as patch:
            patch.setattr(torch, name, refuse)
            with contextlib.suppress(torch.OutOfMemoryError):
                made.put(0, row, range(200))

    made.put(0, row, (1, 2))
    assert made.sample(random_logits(1), made.plan([0])).tokens.tolist() != [BAD_ROW]
