"""The states of a job and the moves between them."""

from __future__ import annotations

from itertools import product
from uuid import RFC_4122, UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.jobs import (
    FINAL_STATES,
    TRANSITIONS,
    JobState,
    Usage,
    can_move,
    digits_of,
    int64,
    job_id_of,
    job_ids_in,
    new_id,
)


@given(st.frozensets(st.uuids()))
def test_ids_in_news_are_those_that_were_written(job_ids: frozenset[UUID]) -> None:
    assert job_ids_in(digits_of(job_ids)) == job_ids


@given(st.text() | st.from_regex(r"[0-9a-f{}-]{0,100}"))
def test_news_of_somebody_elses_hold_ids_or_nothing(words: str) -> None:
    assert all(isinstance(job_id, UUID) for job_id in job_ids_in(words))


def test_a_final_state_is_left_by_no_move() -> None:
    for before, after in product(FINAL_STATES, JobState):
        assert before.is_final
        assert not can_move(before, after)


def test_every_state_can_end_and_no_state_moves_to_itself() -> None:
    for state in JobState:
        assert not can_move(state, state)
        reached, frontier = {state}, {state}
        while frontier:
            frontier = {after for each in frontier for after in TRANSITIONS[each]} - reached
            reached |= frontier
        assert reached & FINAL_STATES


def test_only_a_running_job_completes_or_is_given_back() -> None:
    assert [before for before in JobState if can_move(before, JobState.COMPLETED)] == ["running"]
    assert [before for before in JobState if can_move(before, JobState.QUEUED)] == ["running"]


def test_the_total_of_a_usage_is_its_parts() -> None:
    assert Usage(input_tokens=7, output_tokens=5).total_tokens == 12


def test_ids_of_our_own_grow_with_time_and_say_when_they_were_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # given moments that are half a microsecond apart, or more
    moments_ns = [1_700_000_000_000_000_000 + n for n in (0, 500, 999_999, 1_000_000, 10**9)]

    # when an id is made at each
    ids = []
    for moment_ns in moments_ns:
        monkeypatch.setattr("time.time_ns", lambda moment_ns=moment_ns: moment_ns)
        ids.append(new_id())

    # then they are of version 7, in this order, and begin with the time in ms
    assert ids == sorted(ids)
    assert {(each.version, each.variant) for each in ids} == {(7, RFC_4122)}
    assert [each.int >> 80 for each in ids] == [moment // 10**6 for moment in moments_ns]


def test_no_two_ids_of_our_own_are_the_same_even_at_one_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.time_ns", lambda: 1_700_000_000_000_000_000)
    assert len({new_id() for _ in range(1_000)}) == 1_000


def test_a_task_id_that_is_a_uuid_stands_for_itself() -> None:
    job_id = uuid4()

    assert job_id_of(str(job_id)) == job_id_of(job_id.hex.upper()) == job_id


@pytest.mark.parametrize("text", ["order-7", "", "mühle", "x" * 255])
def test_any_other_task_id_has_a_job_id_of_its_own_that_never_changes(text: str) -> None:
    assert job_id_of(text) == job_id_of(text)
    assert job_id_of(text).version == 5
    assert job_id_of(text) != job_id_of(text + "!")


def test_the_mapping_of_task_ids_is_fixed_for_good() -> None:
    """Rows outlive releases: another mapping would lose the jobs of before."""
    assert job_id_of("order-7") == UUID("9e53a750-f2db-564f-b2cb-1b09504df7d2")


@pytest.mark.parametrize(
    ("number", "wrapped"), [(7, 7), (-1, -1), (2**63, -(2**63)), (-(2**63) - 1, 2**63 - 1)]
)
def test_a_number_is_wrapped_to_64_bits(number: int, wrapped: int) -> None:
    assert int64(number) == wrapped
