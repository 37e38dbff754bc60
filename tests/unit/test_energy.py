"""The rules of energy: what counters say, what phases took, what attempts pay."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.books.energy import (
    MOST_WATTS,
    SECOND_NS,
    STALE_NS,
    EnergyMethod,
    Gauge,
    IdlePower,
    Paid,
    PowerModel,
    Taken,
    Unpaid,
    by_phase,
    carbon_ug,
    sum_of,
)

MEASURED, ESTIMATED, ABSENT = EnergyMethod
MS = 1_000_000
J = 1_000_000_000
"""In nanojoules; a joule in a second is a watt."""


def test_between_two_steps_of_a_counter_the_power_of_the_last_one_goes_on() -> None:
    gauge = Gauge(0, 0)
    assert gauge.take(100 * MS, 10 * J) == Taken(10 * J, MEASURED)  # 100 W

    # when it is asked before the counter moves again
    assert gauge.take(130 * MS, 10 * J) == Taken(3 * J, MEASURED)
    assert gauge.take(150 * MS, None) == Taken(2 * J, MEASURED)

    # then what was taken ahead is paid back by the next step
    assert gauge.take(200 * MS, 22 * J) == Taken(7 * J, MEASURED)


def test_what_was_taken_ahead_too_much_is_paid_back_and_nothing_is_negative() -> None:
    gauge = Gauge(0, 0)
    gauge.take(100 * MS, 10 * J)
    assert gauge.take(200 * MS, None).nj == 10 * J

    assert gauge.take(300 * MS, 13 * J).nj == 0  # 3 J came, 10 were taken
    assert gauge.take(400 * MS, 22 * J).nj == 2 * J  # of 9 J, 7 are still to be paid back


def test_a_counter_that_wraps_goes_on() -> None:
    gauge = Gauge(0, 99 * J, wraps_at_nj=100 * J)

    assert gauge.take(SECOND_NS, 4 * J) == Taken(5 * J, MEASURED)


@pytest.mark.parametrize(
    ("before", "after", "wraps_at"),
    [
        (500 * J, 0, None),  # the driver was loaded anew
        (500 * J, 499 * J, None),
        (500 * J, 499 * J, 10**9 * J),  # to wrap it would have to draw gigawatts
        (500 * J, 10**12 * J, None),
    ],
)
def test_over_a_reset_or_a_jump_the_power_goes_on_and_it_is_labelled(
    before: int, after: int, wraps_at: int | None
) -> None:
    gauge = Gauge(0, before - 100 * J, wraps_at)
    gauge.take(SECOND_NS, before)

    assert gauge.take(2 * SECOND_NS, after) == Taken(100 * J, ESTIMATED, was_reset=True)

    assert gauge.take(3 * SECOND_NS, after + 7 * J) == Taken(7 * J, MEASURED)


def test_of_a_reset_at_the_beginning_nothing_is_known() -> None:
    assert Gauge(0, 500).take(SECOND_NS, 0) == Taken(0, ABSENT, was_reset=True)


def test_a_counter_that_stands_still_is_an_estimate_and_what_it_caught_up_with_stands() -> None:
    gauge = Gauge(0, 0)
    gauge.take(SECOND_NS, 100 * J)
    assert gauge.take(61 * SECOND_NS, None) == Taken(6_000 * J, ESTIMATED)

    # when it is back, and had not counted meanwhile
    assert gauge.take(62 * SECOND_NS, 150 * J) == Taken(0, MEASURED)
    assert gauge.take(63 * SECOND_NS, 250 * J) == Taken(100 * J, MEASURED)


def test_a_counter_that_never_moves_tells_nothing() -> None:
    gauge = Gauge(0, 0)

    assert gauge.take(STALE_NS + 1, 0) == Taken(0, ABSENT)


readings = st.lists(
    st.tuples(st.integers(0, 10 * SECOND_NS), st.one_of(st.none(), st.integers(0, 10**16))),
    max_size=40,
)


@given(readings, st.one_of(st.none(), st.integers(1, 10**16)))
def test_whatever_a_counter_says_no_energy_is_negative_or_beyond_what_a_device_can_draw(
    readings: list[tuple[int, int | None]], wraps_at: int | None
) -> None:
    now_ns, total_nj = 0, 0
    gauge = Gauge(0, 0, wraps_at)

    for elapsed_ns, counter in readings:
        now_ns += elapsed_ns
        taken = gauge.take(now_ns, counter)
        assert taken.nj >= 0
        total_nj += taken.nj

    assert total_nj <= 2 * MOST_WATTS * (now_ns + len(readings) * SECOND_NS)


@given(
    st.lists(st.tuples(st.integers(1, SECOND_NS), st.integers(0, 500), st.booleans()), max_size=40)
)
def test_the_sum_follows_the_counter(steps: list[tuple[int, int, bool]]) -> None:
    now_ns = counter = total = 0
    gauge = Gauge(0, 0)

    for elapsed_ns, watts, is_read in steps:
        now_ns += elapsed_ns
        counter += watts * elapsed_ns
        total += gauge.take(now_ns, counter if is_read else None).nj
    for _ in range(2):  # enough to pay back what may have been taken ahead
        now_ns += 40 * SECOND_NS
        counter += 500 * 40 * SECOND_NS
        total += gauge.take(now_ns, counter).nj

    assert total >= counter  # guesses of dead time stand
    if all(is_read for _, _, is_read in steps):
        assert total == counter


def test_several_counters_are_known_as_well_as_the_worst_of_them() -> None:
    parts = [Taken(3, MEASURED), Taken(4, ESTIMATED, was_reset=True)]

    assert sum_of(parts) == Taken(7, ESTIMATED, was_reset=True)


def test_idle_time_takes_its_own_power_and_the_rest_is_shared_by_time() -> None:
    assert by_phase(100, 10, [30, 60], idle_mw=1_000) == [10, 30, 60]
    assert by_phase(100, 10, [30, 60], idle_mw=None) == [10, 30, 60]
    assert by_phase(5, 10, [30, 60], idle_mw=1_000) == [5, 0, 0]
    assert by_phase(100, 10, [0, 0], idle_mw=1_000) == [100, 0, 0]


def test_idle_power_is_learned_from_a_second_with_nothing_to_do() -> None:
    power = IdlePower(None)
    for _ in range(9):
        power.learn(100 * MS, 2 * J, is_pure=True)
    assert power.milliwatts is None
    power.learn(100 * MS, 50 * J, is_pure=False)  # something ran: it begins anew
    for _ in range(10):
        power.learn(100 * MS, 3 * J, is_pure=True)

    assert power.milliwatts == 30_000
    assert IdlePower(PowerModel(7, 9)).milliwatts == 7


def test_attempts_pay_by_their_time_and_the_last_one_pays_the_rest() -> None:
    unpaid = Unpaid()
    unpaid.add(30, 100, MEASURED)

    assert unpaid.pay(10, 0) == Paid(33, 0, MEASURED)
    assert unpaid.pay(5, 5) == Paid(17, 16, MEASURED)
    assert unpaid.pay(10, 0) == Paid(34, 0, MEASURED)
    assert (unpaid.ns, unpaid.nj) == (0, 0)


def test_a_guess_marks_all_time_that_waited_then_and_no_other() -> None:
    unpaid = Unpaid()
    unpaid.add(10, 10, MEASURED)
    unpaid.add(10, 10, ESTIMATED)
    unpaid.add(10, 10, MEASURED)

    assert [unpaid.pay(10, 0).method for _ in range(3)] == [ESTIMATED, ESTIMATED, MEASURED]


def test_without_any_energy_known_an_attempt_has_none() -> None:
    unpaid = Unpaid()
    unpaid.add(10, 0, ABSENT)

    assert unpaid.pay(10, 0) == Paid(None, None, ABSENT)


moves = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 10**12), st.integers(0, 10**15), st.sampled_from(EnergyMethod)),
        st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)),
    ),
    max_size=40,
)


@given(moves)
def test_what_is_paid_and_what_is_unpaid_is_what_was_added(moves: list[tuple[int, ...]]) -> None:
    unpaid, added, paid = Unpaid(), 0, 0

    for move in moves:
        if len(move) == 3:
            ns, nj, method = move
            unpaid.add(ns, nj if ns else 0, EnergyMethod(method))
            added += nj if ns else 0
        else:
            bill = unpaid.pay(*move)
            paid += (bill.energy_nj or 0) + (bill.wasted_nj or 0)
            assert (bill.energy_nj is None) == (bill.method is ABSENT)
        assert min(unpaid.ns, unpaid.nj) >= 0
        assert paid + unpaid.nj == added
        if not unpaid.ns:
            assert not unpaid.nj


def test_carbon_is_the_intensity_times_the_energy() -> None:
    assert carbon_ug(3_600_000 * J, Fraction(380)) == 380_000_000
    assert carbon_ug(1, Fraction(0)) == 0
