"""The prompt tokens of a step follow the pace of the machine."""

from __future__ import annotations

import pytest

from app.engines.inflight.budget import PromptBudget


@pytest.mark.parametrize(("token_ns", "tokens"), [(400_000, 500), (2_000_000, 100)])
def test_a_step_comes_to_take_as_long_as_is_allowed(token_ns: int, tokens: int) -> None:
    budget = PromptBudget(stall_ms=200)

    for _ in range(60):
        budget.observe(budget.tokens, budget.tokens * token_ns)

    assert budget.tokens == pytest.approx(tokens, rel=0.02)


def test_small_steps_say_nothing_and_the_bounds_hold() -> None:
    budget = PromptBudget(stall_ms=200)
    before = budget.tokens

    budget.observe(8, 10**12)
    assert budget.tokens == before

    budget.observe(100, 10**12)
    assert budget.tokens == 32


def test_a_fixed_number_of_tokens_stays() -> None:
    budget = PromptBudget(stall_ms=200, fixed=50)
    budget.observe(100, 10**12)
    assert budget.tokens == 50
