"""Shares add up exactly and follow the written rule."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.books.cost import NANO, Meter, Used
from app.books.shares import decode_weights, prefill_weights, share

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


@given(
    st.lists(st.integers(0, 10**12), max_size=50),
    st.decimals("0", "1000", places=9),
)
def test_what_a_meter_charges_is_the_price_of_the_sum(shares: list[int], price: Decimal) -> None:
    meter = Meter(price)

    charges = [meter.cost_of(Used(device_ns)) for device_ns in shares]

    assert sum(charges) == Meter(price).cost_of(Used(sum(shares)))
    assert all(charge >= 0 and charge % NANO == 0 for charge in charges)


def test_an_hour_costs_the_price_of_an_hour() -> None:
    cost = Meter(Decimal("2.49")).cost_of(Used(3_600_000_000_000))

    assert cost == Decimal("2.490000000")


AMOUNTS = st.decimals("0", "1000", places=9)


@given(
    st.lists(
        st.builds(
            Used,
            device_ns=st.integers(0, 10**12),
            input_tokens=st.integers(0, 10**6),
            output_tokens=st.integers(0, 10**6),
            charge=st.decimals("0", "10", places=12),
        ),
        max_size=50,
    ),
    AMOUNTS,
    AMOUNTS,
    AMOUNTS,
)
def test_charges_for_tokens_and_of_servers_add_up_to_the_price_of_the_sum_as_well(
    uses: list[Used], hour: Decimal, million_in: Decimal, million_out: Decimal
) -> None:
    meter = Meter(hour, million_in, million_out)

    charges = [meter.cost_of(used) for used in uses]

    whole = sum(uses, Used())
    exact = (
        Fraction(hour) * whole.device_ns / 3_600_000_000_000
        + Fraction(million_in) * whole.input_tokens / 1_000_000
        + Fraction(million_out) * whole.output_tokens / 1_000_000
        + Fraction(whole.charge)
    )
    assert abs(Fraction(sum(charges)) - exact) <= Fraction(NANO)
    assert all(charge >= 0 and charge % NANO == 0 for charge in charges)
