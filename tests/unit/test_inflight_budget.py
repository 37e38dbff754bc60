"""The prompt tokens of a step follow the pace of the machine."""

from __future__ import annotations

import pytest

from app.engines.inflight.budget import PromptBudget


@pytest.mark.parametrize(
    ("step_ns", "token_ns", "tokens"),
    [(0, 400_000, 500), (0, 2_000_000, 100), (40_000_000, 400_000, 400)],
)
def test_a_step_comes_to_take_as_long_as_is_allowed(
    step_ns: int, token_ns: int, tokens: int
) -> None:
    budget = PromptBudget(stall_ms=200)

    for _ in range(100):
        for num_tokens in (budget.tokens(0), 20):  # prompts, then a step that only decodes
            budget.observe(num_tokens, step_ns + num_tokens * token_ns)

    assert budget.tokens(0) == pytest.approx(tokens, rel=0.02)
    assert budget.tokens(num_rows=30) == budget.tokens(0) - 30


def test_decoding_for_long_does_not_make_prompts_look_slow() -> None:
    budget = PromptBudget(stall_ms=200)
    for _ in range(100):
        for num_tokens in (budget.tokens(0), 40):
            budget.observe(num_tokens, 40_000_000 + num_tokens * 400_000)

    for _ in range(1000):
        budget.observe(40, 40_000_000 + 40 * 400_000)

    assert budget.tokens(0) == pytest.approx(400, rel=0.02)


def test_the_bounds_hold() -> None:
    budget = PromptBudget(stall_ms=200)

    budget.observe(100, 10**12)
    assert budget.tokens(0) == 32

    for _ in range(1000):
        budget.observe(100, 1)
    assert budget.tokens(0) == 4096


def test_a_fixed_number_of_tokens_stays() -> None:
    budget = PromptBudget(stall_ms=200, fixed=50)
    budget.observe(100, 10**12)
    assert budget.tokens(num_rows=30) == 50
