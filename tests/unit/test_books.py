"""Shares add up exactly and follow the written rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import permutations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.books.cost import HOUR_NS, NANO, device_cost, token_charge, upstream_cost
from app.books.shares import decode_weights, prefill_weights, share
from app.config.settings import PriceSettings
from app.jobs import Usage

totals = st.integers(0, 10**15)
fractions = st.fractions(min_value=0, max_value=10**6, max_denominator=10**4)
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def test_equal_shares_of_what_does_not_divide_go_up_in_order() -> None:
    assert share(100, [1, 1, 1]) == [34, 33, 33]


def test_the_largest_remainder_goes_up_first() -> None:
    assert share(10, [1, 5, 3]) == [1, 6, 3]


def test_without_weights_all_pay_the_same() -> None:
    assert share(7, [0, 0]) == [4, 3]


@pytest.mark.parametrize(("total", "weights"), [(-1, [1]), (1, [1, -1]), (1, [])])
def test_what_cannot_be_shared_is_refused(total: int, weights: list[int]) -> None:
    with pytest.raises(ValueError, match=r"negative|nobody"):
        share(total, weights)


@given(totals, st.lists(st.one_of(st.integers(0, 10**9), fractions), min_size=1, max_size=64))
def test_parts_sum_to_the_total_and_each_is_within_one_of_its_due(
    total: int, weights: list[int | Fraction]
) -> None:
    parts = share(total, weights)

    assert sum(parts) == total
    if all_weight := sum(map(Fraction, weights)):
        for part, weight in zip(parts, weights, strict=True):
            assert abs(part - total * Fraction(weight) / all_weight) < 1


def test_decoding_is_paid_by_the_steps_a_row_is_in() -> None:
    # given rows A and B, of which A leaves after two steps
    steps = [{"A": 3, "B": 5}, {"A": 4, "B": 6}, {"B": 7}, {"B": 8}]

    # when
    paid = {"A": Fraction(0), "B": Fraction(0)}
    for step in steps:
        weights = decode_weights(list(step.values()), fixed=120, per_row=10, per_token=1)
        for row, weight in zip(step, weights, strict=True):
            paid[row] += Fraction(weight, len(step))

    # then
    assert paid == {"A": 147, "B": 426}


def test_padded_prefill_charges_both_sides_of_the_padding() -> None:
    assert prefill_weights([2, 5, 9], fixed=12, per_position=2) == [16, 19, 31]


@given(lengths, st.integers(0, 50), st.integers(0, 50))
def test_prefill_weights_sum_to_the_cost_of_the_padded_pass(
    prompts: list[int], fixed: int, per_position: int
) -> None:
    weights = prefill_weights(prompts, fixed, per_position)

    assert sum(weights) == fixed + per_position * len(prompts) * max(prompts)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_prefill_weights_are_the_average_over_all_orders_of_joining(prompts: list[int]) -> None:
    def cost(members: list[int]) -> int:
        return 7 + 3 * len(members) * max(prompts[row] for row in members) if members else 0

    # given what each prompt adds to the cost, in every order in which they could join
    added = [Fraction(0)] * len(prompts)
    orders = list(permutations(range(len(prompts))))
    for order in orders:
        for place, row in enumerate(order):
            joined = list(order[:place])
            added[row] += cost([*joined, row]) - cost(joined)

    # then
    assert prefill_weights(prompts, 7, 3) == [each / len(orders) for each in added]


@given(st.lists(st.integers(0, 5000), min_size=2, max_size=20))
def test_a_mate_never_raises_the_price_of_a_decode_step(contexts: list[int]) -> None:
    alone = decode_weights(contexts[:1], 120, 10, 1)[0]

    assert Fraction(decode_weights(contexts, 120, 10, 1)[0], len(contexts)) <= alone


AMOUNTS = st.decimals("0", "1000", places=9)
TIMES = st.integers(0, 10**15)


@given(TIMES, AMOUNTS)
def test_device_time_costs_its_exact_price_rounded_half_up(ns: int, price: Decimal) -> None:
    exact = Fraction(price) * ns / HOUR_NS

    cost = device_cost(ns, price)

    assert Fraction(cost) - exact <= Fraction(NANO) / 2
    assert exact - Fraction(cost) < Fraction(NANO) / 2
    assert device_cost(-ns, price) == -cost
    assert cost.as_tuple().exponent == -9


def test_an_hour_costs_the_price_of_an_hour_and_half_a_nano_unit_is_one() -> None:
    assert device_cost(HOUR_NS, Decimal("2.49")) == Decimal("2.490000000")
    assert device_cost(1_800, Decimal(1)) == Decimal("0.000000001")
    assert device_cost(1_799, Decimal(1)) == 0


def a_price(**given: object) -> PriceSettings:
    return PriceSettings.model_validate({"per_device_hour": "1", "currency": "USD"} | given)


TOKENS = st.integers(0, 10**6)
PARTS = st.decimals("0", "1", places=9)


@given(st.tuples(TOKENS, TOKENS, TOKENS), st.tuples(AMOUNTS, AMOUNTS, AMOUNTS), PARTS)
def test_tokens_cost_what_the_tariff_says_cached_ones_apart(
    tokens: tuple[int, int, int], prices: tuple[Decimal, Decimal, Decimal], discount: Decimal
) -> None:
    names = ("input_tokens", "cached_input_tokens", "output_tokens")
    tariff = {f"per_million_{name}": price for name, price in zip(names, prices, strict=True)}
    fresh, cached, output = tokens

    charge = token_charge(
        a_price(**tariff, batch_discount=discount), Usage(fresh + cached, output, cached)
    )

    full = sum(n * Fraction(each) for n, each in zip(tokens, prices, strict=True))
    exact = full / 1_000_000 * (1 - Fraction(discount))
    assert (charge is None) == (not any(prices))
    assert abs(Fraction(charge or 0) - exact) <= Fraction(NANO) / 2


def test_cached_tokens_without_a_price_of_their_own_cost_what_others_do() -> None:
    price = a_price(per_million_input_tokens="2")

    assert token_charge(price, Usage(500_000, 0, 400_000)) == 1
    assert token_charge(a_price(), Usage(500_000, 9)) is None


def test_where_the_price_knows_no_device_tokens_are_what_a_server_elsewhere_costs() -> None:
    tariff = {"per_million_output_tokens": "3"}
    asked = [Decimal("0.25"), Decimal("0.0000000004")]

    assert upstream_cost(a_price(**tariff), Usage(9, 10**6), []) is None
    assert upstream_cost(a_price(**tariff), Usage(9, 10**6), asked) == Decimal("0.25")
    elsewhere = a_price(**tariff, per_device_hour="0")
    assert upstream_cost(elsewhere, Usage(9, 10**6), asked) == Decimal("3.25")


@dataclass(frozen=True)
class Step:
    """A step of rows with these contexts, and how long it takes with some of them alone."""

    contexts: Sequence[int]
    fixed: int
    per_row: int
    per_token: int

    def takes(self, members: Sequence[int]) -> int:
        own = sum(self.per_row + self.per_token * self.contexts[row] for row in members)
        return self.fixed + own if members else 0

    def shapley(self) -> list[Fraction]:
        """By brute force: the average of what a row adds, over all orders in which they join."""
        added = [0] * len(self.contexts)
        orders = list(permutations(range(len(self.contexts))))
        for order in orders:
            for place, row in enumerate(order):
                added[row] += self.takes(order[: place + 1]) - self.takes(order[:place])
        return [Fraction(each, len(orders)) for each in added]


def test_what_rows_are_charged_is_within_a_hundredth_of_what_all_orders_of_joining_say() -> None:
    chance, largest = Random(13), Fraction(0)
    for _ in range(60):
        contexts = [chance.randint(1, 4_000) for _ in range(chance.randint(1, 6))]
        step = Step(contexts, chance.randint(1, 10**6), chance.randint(0, 10**5), 37)

        # measured time is not that of the model, and is shared in whole nanoseconds
        modelled = step.takes(range(len(contexts)))
        measured = modelled + chance.randint(0, 1_000)
        weights = decode_weights(contexts, step.fixed, step.per_row, step.per_token)
        for ns, value in zip(share(measured, weights), step.shapley(), strict=True):
            exact = value * measured / modelled
            largest = max(largest, abs(ns - exact) / exact)

    print(f"largest difference from Shapley's value: {float(largest):.2e}")  # noqa: T201
    assert largest <= Fraction(1, 100)
