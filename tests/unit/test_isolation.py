"""Whoever is guilty of a group's failure is found by halves, and the others go on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import GristmillError, NotStorable, RequestError, Unavailable
from app.worker.isolation import by_halves


@given(
    size=st.integers(0, 60),
    bad=st.sets(st.integers(0, 59)),
    error=st.sampled_from([NotStorable(), RequestError()]),
)
def test_exactly_the_guilty_are_refused(size: int, bad: set[int], error: Exception) -> None:
    refused: list[int] = []

    def act(items: Sequence[int]) -> list[int]:
        if bad.intersection(items):
            raise error
        return list(items)

    parts = by_halves(range(size), act, lambda item, _: refused.append(item))

    done = [item for part in parts for item in part]
    assert done == [item for item in range(size) if item not in bad]
    assert refused == [item for item in range(size) if item in bad]


@pytest.mark.parametrize(
    "error",
    [
        *(Unavailable(), GristmillError(), OSError(), AttributeError()),
        *(ValueError(), KeyError(), TypeError()),  # else each job would fail for it, one by one
    ],
)
def test_a_server_that_is_away_and_a_bug_are_nobodys_fault(error: Exception) -> None:
    refused: list[int] = []

    def act(_: Sequence[int]) -> None:
        raise error

    with pytest.raises(type(error)):
        by_halves([1, 2, 3], act, lambda item, _: refused.append(item))
    assert refused == []
