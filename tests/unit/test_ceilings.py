"""What a worker learns of its memory from batches that did not fit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from app.worker.engine.ceilings import NO_CEILING, PROOFS, Ceilings


def test_nothing_is_forbidden_before_something_did_not_fit() -> None:
    assert Ceilings().rows("m", 1_000) == NO_CEILING
    assert Ceilings().room("m", inside=3) is None


def test_a_ceiling_holds_for_rows_as_long_or_longer_and_for_its_model_alone() -> None:
    ceilings = Ceilings()

    assert ceilings.overflowed("m", tokens=1_000, rows=16) == 8

    assert ceilings.rows("m", 600) == 8  # of the same power of two
    assert ceilings.rows("m", 5_000) == 8
    assert ceilings.rows("m", 100) == NO_CEILING
    assert ceilings.rows("other", 1_000) == NO_CEILING


def test_what_runs_already_takes_its_part_of_the_room() -> None:
    ceilings = Ceilings()
    ceilings.overflowed("m", tokens=1_000, rows=16)

    room = ceilings.room("m", inside=5)

    assert room is not None
    assert room(1_000) == 3


def test_a_ceiling_rises_by_an_eighth_once_many_batches_have_fitted() -> None:
    ceilings = Ceilings()
    ceilings.overflowed("m", tokens=1_000, rows=32)

    for _ in range(PROOFS * 16 - 1):
        ceilings.fitted("m", 1_000, rows=1)
    assert ceilings.rows("m", 1_000) == 16
    ceilings.fitted("m", 1_000, rows=1)

    assert ceilings.rows("m", 1_000) == 18


def test_short_rows_prove_nothing_for_long_ones() -> None:
    ceilings = Ceilings()
    ceilings.overflowed("m", tokens=1_000, rows=32)

    for _ in range(10_000):
        ceilings.fitted("m", 10, rows=1)

    assert ceilings.rows("m", 1_000) == 16


@given(st.lists(st.tuples(st.integers(1, 5_000), st.integers(1, 64))))
def test_longer_rows_never_have_more_room_than_shorter_ones(
    overflows: list[tuple[int, int]],
) -> None:
    ceilings = Ceilings()
    for tokens, rows in overflows:
        assert 1 <= ceilings.overflowed("m", tokens, rows) <= max(1, rows // 2)

    by_length = [ceilings.rows("m", tokens) for tokens in range(1, 5_000, 50)]

    assert by_length == sorted(by_length, reverse=True)
