"""The kernel finds the largest logit of each row where torch finds it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engines.inflight import native
from app.engines.inflight.library import library
from app.engines.sampling import draws

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C++ compiler")


@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 600),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_the_largest_and_the_first_of_equals_are_those_that_torch_finds(
    rows: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    # given: few different numbers, so that most rows hold their largest more than once
    values = torch.randint(-9, 3, (rows, width), generator=torch.manual_seed(seed)).to(dtype)
    values[values < -7] = float("-inf")

    tops, places = native.largest(values)

    wanted, first = draws.largest(values)
    assert tops.tolist() == wanted.tolist()
    assert places.tolist() == first.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("place", [0, 15, 16, 69])
def test_a_row_that_holds_nan_has_it_for_its_largest_and_its_mates_do_not(
    dtype: torch.dtype, place: int
) -> None:
    values = torch.zeros(3, 70, dtype=dtype)
    values[0, 3] = float("inf")
    values[1, place] = float("nan")
    values[2] = float("-inf")

    tops, places = native.largest(values)

    assert str(tops.tolist()) == "[inf, nan, -inf]"
    assert places[0] == 3
    assert ((places >= 0) & (places < 70)).all()
