"""The arithmetic of agreement."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.jobs import Kind
from app.trials.agreement import (
    MAIN,
    MEASURES,
    OF_KIND,
    Bound,
    Reading,
    Writing,
    common_prefix,
    cosine,
    main_measure,
    of_classes,
    of_rankings,
    of_readings,
    of_texts,
    of_vectors,
    shown_figure,
    worst,
)

TOKENS = st.lists(st.integers(0, 9), min_size=1, max_size=12)
LOGPROBS = st.lists(st.floats(-9999, 0), min_size=1, max_size=12)
VECTORS = st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3)


def writing(tokens: list[int]) -> Writing:
    return Writing("".join(map(chr, (65 + token for token in tokens))), tuple(tokens))


def test_texts_are_counted_up_to_their_first_difference_and_place_by_place() -> None:
    # given one that is the same, one that leaves after two tokens and comes back, and a longer one
    pairs = [([1, 2, 3], [1, 2, 3]), ([1, 2, 3, 4], [1, 2, 0, 4]), ([5], [5, 6])]

    figures = of_texts((writing(a), writing(b)) for a, b in pairs)

    assert figures == {
        "identical": pytest.approx(1 / 3),
        "prefix": pytest.approx((1 + 2 / 4 + 1 / 2) / 3),
        "positions": pytest.approx((3 + 3 + 1) / (3 + 4 + 2)),
    }


def test_of_texts_without_tokens_only_the_texts_are_compared() -> None:
    assert of_texts([(Writing("a"), Writing("a")), (Writing("b"), Writing("c"))]) == {
        "identical": 0.5
    }
    assert of_texts([(writing([1]), writing([1]))], by_token=False) == {"identical": 1.0}


@given(TOKENS, TOKENS)
def test_shares_are_shares_the_same_from_both_sides_and_one_only_for_the_same(
    first: list[int], second: list[int]
) -> None:
    figures = of_texts([(writing(first), writing(second))])

    assert figures == of_texts([(writing(second), writing(first))])
    assert all(0 <= value <= 1 for value in figures.values())
    assert figures["prefix"] <= figures["positions"]
    assert {figures[name] == 1 for name in figures} == {first == second}
    common = common_prefix(first, second)
    assert first[:common] == second[:common]
    assert first[common : common + 1] != second[common : common + 1] or first == second


def test_readings_tell_of_numbers_choices_and_perplexity() -> None:
    reference = Reading((-1.0, -2.0), (5, 6))
    found = Reading((-1.5, -2.0), (5, 7))

    figures = of_readings([(reference, found)])

    assert figures == {
        "same_token": 0.5,
        "logprob_mean": 0.25,
        "logprob_max": 0.5,
        "perplexity": pytest.approx(math.exp(1.75) / math.exp(1.5) - 1),
    }
    assert of_readings([]) == {}


def test_what_only_one_has_read_is_left_out() -> None:
    assert of_readings([(Reading((-1.0, -2.0), (5, 6)), Reading((-1.0,), (5,)))]) == {
        "same_token": 1.0,
        "logprob_mean": 0.0,
        "logprob_max": 0.0,
        "perplexity": 0.0,
    }


@given(LOGPROBS, LOGPROBS)
def test_differences_are_finite_and_never_negative(first: list[float], second: list[float]) -> None:
    figures = of_readings([(Reading(tuple(first), ()), Reading(tuple(second), ()))])

    assert all(math.isfinite(value) and value >= 0 for value in figures.values())
    assert figures["logprob_mean"] <= figures["logprob_max"] * (1 + 1e-12)


@given(VECTORS, VECTORS)
def test_a_cosine_is_one_and_minds_no_length(first: list[float], second: list[float]) -> None:
    found = cosine(first, second)

    assert -1 <= found <= 1
    assert found == pytest.approx(cosine([3 * each for each in first], second), abs=1e-9)
    assert cosine(first, first) in (0.0, pytest.approx(1))


def test_vectors_are_told_by_the_mean_and_by_the_worst() -> None:
    pairs = [([1.0, 0.0], [2.0, 0.0]), ([1.0, 0.0], [1.0, 1.0])]

    found = of_vectors(pairs)

    assert found == {
        "cosine_mean": pytest.approx((1 + 0.5**0.5) / 2),
        "cosine_min": pytest.approx(0.5**0.5),
    }


def test_classes_and_orders_are_told_apart_from_scores() -> None:
    assert of_classes([([0.9, 0.1], [0.6, 0.4]), ([0.5, 0.4], [0.4, 0.5])]) == {
        "same_class": 0.5,
        "score_mean": pytest.approx(0.2),
        "score_max": pytest.approx(0.3),
    }
    # of three documents two have changed places
    one, other = [[0.1], [0.2], [0.3]], [[0.1], [0.3], [0.2]]
    assert of_rankings([list(zip(one, other, strict=True))])["same_order"] == pytest.approx(2 / 3)
    assert "same_order" not in of_rankings([[([0.1], [0.1])]])


def test_the_worst_of_a_share_is_the_least_and_of_a_difference_the_most() -> None:
    assert worst([{"identical": 0.9, "score_max": 0.1}, {"identical": 0.8, "score_max": 0.2}]) == {
        "identical": 0.8,
        "score_max": 0.2,
    }


def test_a_bound_holds_a_share_from_below_and_a_difference_from_above() -> None:
    assert Bound("identical", 0.9).allows({"identical": 0.9})
    assert not Bound("identical", 0.9).allows({"identical": 0.8})
    assert Bound("logprob_max", 0.1).allows({"logprob_max": 0.1})
    assert not Bound("logprob_max", 0.1).allows({"logprob_max": 0.2})


@pytest.mark.parametrize("measure", MEASURES)
def test_what_was_not_measured_keeps_no_bound(measure: str) -> None:
    assert not Bound(measure, 0.0 if MEASURES[measure].is_share else 9e9).allows({})
    assert not Bound(measure, 0.0).allows({measure: math.nan})
    assert not Bound("", 0.0).allows({})  # where nobody had an answer, no measure stands for all


def test_each_kind_has_a_measure_that_stands_for_all() -> None:
    for kind in Kind:
        assert main_measure(dict.fromkeys(OF_KIND[kind], 1.0)) in MAIN
    assert {name for names in OF_KIND.values() for name in names} == MEASURES.keys()


def test_what_is_not_quite_all_or_nothing_does_not_look_so() -> None:
    assert shown_figure("identical", 0.999999) == "99.99%"
    assert shown_figure("identical", 1e-9) == "0.01%"
    assert shown_figure("identical", 1.0) == "100.00%"
