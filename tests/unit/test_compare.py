"""Turns, percentiles and what is told of a comparison; nothing is run."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.cli.comparison_page import agreement_rows, page_of, side_rows
from app.store.comparisons import StoredComparison
from app.trials.compare import Comparison, Side, arrivals_ns, percentile, speed_in, turns

NUMBERS = st.lists(st.floats(0, 1e9), min_size=1, max_size=50).map(sorted)


def side(name: str, **figures: object) -> Side:
    given: dict[str, object] = {
        "name": name,
        "engine": "inflight",
        "dtype": "float32",
        "kernels": "torch",
        "digest": name,
        "load_s": 1.5,
        "num_tokens": 100,
        "num_failed": 0,
        "tokens_per_s": [90.0, 100.0, 120.0],
        "p50_ms": 10.0,
        "p95_ms": 20.0,
        "device_s": 1.0,
        "cost_per_million_tokens": 0.5,
        "currency": "USD",
        "joules_per_million_tokens": None,
        "energy": "absent",
        "peak_bytes": 10**9,
        "device_bytes": None,
        "itself": {"identical": 1.0},
    }
    return Side(**(given | figures))  # type: ignore[arg-type]


def comparison(a: Side, b: Side) -> Comparison:
    return Comparison(
        "two cores", "generate", "d", 36, None, a, b, {"identical": 0.5, "prefix": 0.75}
    )


@pytest.mark.parametrize(
    ("num_rounds", "told"),
    [(1, "a1 b1"), (2, "a1 b2 a1"), (3, "a1 b2 a2 b1"), (4, "a1 b2 a2 b2 a1")],
)
def test_both_take_turns_and_who_goes_on_is_not_loaded_again(num_rounds: int, told: str) -> None:
    assert " ".join(f"{name}{rounds}" for name, rounds in turns(num_rounds)) == told


@given(st.integers(1, 50))
def test_both_run_as_many_rounds(num_rounds: int) -> None:
    found: Counter[str] = Counter()
    for name, rounds in turns(num_rounds):
        found[name] += rounds
        assert 1 <= rounds <= 2

    assert found == {"a": num_rounds, "b": num_rounds}


@given(st.integers(1, 200), st.floats(0.01, 1e5))
def test_prompts_come_in_order_the_first_at_once_and_always_at_the_same_times(
    count: int, rate: float
) -> None:
    found = arrivals_ns(count, rate)

    assert (len(found), found[0]) == (count, 0)
    assert found == sorted(found) == arrivals_ns(count, rate)


@given(NUMBERS, st.floats(0.01, 1))
def test_a_percentile_is_one_of_the_values_that_so_many_do_not_pass(
    ordered: list[float], share: float
) -> None:
    found = percentile(ordered, share)

    assert found in ordered
    assert sum(each <= found for each in ordered) >= share * len(ordered) - 1e-9
    assert sum(each < found for each in ordered) < share * len(ordered)


def test_the_rows_say_how_both_compare_and_what_is_not_known() -> None:
    found = comparison(side("small"), side("small:x=1", tokens_per_s=[200.0], p95_ms=5.0))

    rows = {row[0]: row[1:] for row in side_rows(found)}

    assert rows["tokens/s, median of the rounds"] == ("100.0", "200.0", "2.00")
    assert rows["wait and run of a prompt, p95, ms"] == ("20", "5", "0.25")
    assert rows["cost of a million tokens, USD"] == ("0.5000", "0.5000", "1.00")
    assert rows["energy of a million tokens, J"] == ("absent", "absent", "")
    assert list(agreement_rows(found)) == [
        ("identical texts", "50.00%", "100.00%", "100.00%"),
        ("common beginning, share of the tokens", "75.00%", "–", "–"),
    ]


def test_a_side_that_wrote_nothing_divides_by_nothing() -> None:
    nothing = side("none", tokens_per_s=[0.0], num_tokens=0, cost_per_million_tokens=None)
    found = comparison(nothing, side("other"))

    rows = {row[0]: row[1:] for row in side_rows(found)}

    assert found.figures["speed_ratio"] is None
    assert rows["tokens of a round"] == ("0", "100", "–")
    assert rows["cost of a million tokens, USD"] == ("absent", "0.5000", "–")
    assert page_of(found, ())


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_for_nothing_and_nothing_in_it_is_markup() -> None:
    # given names with markup in them, and an earlier comparison with other figures
    found = comparison(side("<script>alert(1)</script>"), side('b"&'))
    other = StoredComparison(
        datetime(2027, 1, 2, tzinfo=UTC), "m", "generate", 3, "a", "b", {"a": {"odd": 1}}
    )
    same = StoredComparison(
        datetime(2027, 1, 3, tzinfo=UTC), "m", "generate", 3, "a", "b", found.figures
    )

    # when
    page = page_of(found, (same, other))

    # then
    tags = _Tags()
    tags.feed(page)
    assert (tags.open, tags.links) == ([], [])
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<svg") == 5


def test_speeds_are_read_from_whatever_is_stored() -> None:
    assert speed_in(comparison(side("a"), side("b")).figures, "a") == 100.0
    for odd in (
        {},
        {"a": None},
        {"a": {}},
        {"a": {"tokens_per_s": []}},
        {"a": {"tokens_per_s": ["x"]}},
    ):
        assert speed_in(odd, "a") is None
