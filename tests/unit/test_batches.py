"""Batches of callers: counts that add up, places without a gap, states that go forward alone."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app import batches
from app.batches import (
    CANCELLABLE,
    FINAL,
    TRANSITIONS,
    BatchState,
    Counts,
    Door,
    LineFile,
    LineOutcome,
    end_of,
    file_of,
    outcome_of,
    outcome_without_job,
)
from app.jobs import FINAL_STATES, new_id


class OneBatch(RuleBasedStateMachine):
    """A batch whose lines are fed and end in any order, and that is cancelled or over at any
    time."""

    def __init__(self) -> None:
        super().__init__()
        self.state = BatchState.IN_PROGRESS
        self.counts = Counts(total=12)  # few enough to end in the steps that a run has
        self.fed = 0
        self.is_over = False
        self.places: list[tuple[LineFile, int]] = []
        self.outcomes: list[LineOutcome] = []
        self.door = Door.OPENAI

    def end(self, outcomes: list[LineOutcome]) -> None:
        self.counts, places = self.counts.placed(self.door, outcomes)
        self.places += places
        self.outcomes += outcomes

    @rule(door=st.sampled_from(Door))
    @precondition(lambda self: self.fed == 0)
    def submitted_by(self, door: Door) -> None:
        self.door = door

    @rule(num=st.integers(1, 15))
    @precondition(lambda self: self.fed < self.counts.total)
    def feed(self, num: int) -> None:
        num = min(num, self.counts.total - self.fed)
        outcome = outcome_without_job(self.state, is_over=self.is_over)
        self.fed += num
        if outcome is not None:
            self.end([outcome] * num)

    @rule(outcomes=st.lists(st.sampled_from(LineOutcome), max_size=15))
    def jobs_end(self, outcomes: list[LineOutcome]) -> None:
        self.end(outcomes[: self.fed - self.counts.ended])

    @rule()
    def time_passes(self) -> None:
        self.is_over = True

    @rule()
    @precondition(lambda self: self.state in CANCELLABLE)
    def cancel(self) -> None:
        self.move(BatchState.CANCELLING)

    @rule()
    @precondition(lambda self: self.counts.open == 0 and self.state not in FINAL)
    def finish(self) -> None:
        if self.state is BatchState.IN_PROGRESS:
            self.move(BatchState.FINALIZING)
        self.move(end_of(self.state, self.counts))

    def move(self, state: BatchState) -> None:
        assert state in TRANSITIONS[self.state]
        self.state = state

    @invariant()
    def counts_add_up(self) -> None:
        counts = self.counts
        ended = counts.succeeded + counts.errored + counts.cancelled + counts.expired
        assert ended == counts.ended == len(self.outcomes) == counts.output + counts.errors
        assert counts.open + ended == counts.total and 0 <= counts.open <= counts.total
        assert counts.ended <= self.fed
        assert counts.succeeded == self.outcomes.count(LineOutcome.SUCCEEDED)

    @invariant()
    def every_place_is_taken_once(self) -> None:
        for file, most in (
            (LineFile.OUTPUT, self.counts.output),
            (LineFile.ERRORS, self.counts.errors),
        ):
            places = [place for each, place in self.places if each is file]
            assert places == list(range(1, most + 1))

    @invariant()
    def what_was_finished_is_kept(self) -> None:
        if self.state is BatchState.COMPLETED:
            assert self.counts.expired == 0
        if self.state is BatchState.EXPIRED:
            assert self.counts.expired > 0
        if self.state in FINAL:
            assert self.counts.open == 0


TestOneBatch = OneBatch.TestCase


def test_a_state_that_is_final_leads_nowhere_and_all_others_lead_to_one() -> None:
    assert {state for state, others in TRANSITIONS.items() if not others} == FINAL
    assert set(TRANSITIONS) == set(BatchState)
    for state in set(BatchState) - FINAL:
        reached = {state}
        while more := {to for each in reached for to in TRANSITIONS[each]} - reached:
            reached |= more
        assert reached & FINAL


def test_every_end_of_a_job_is_an_outcome() -> None:
    assert {outcome_of(state) for state in FINAL_STATES} == set(LineOutcome)


@given(st.builds(Counts, total=st.just(9), expired=st.integers(0, 9), cancelled=st.integers(0, 9)))
def test_a_batch_has_expired_if_a_line_has_and_was_cancelled_only_if_it_was(counts: Counts) -> None:
    of_itself = BatchState.EXPIRED if counts.expired else BatchState.COMPLETED

    assert end_of(BatchState.FINALIZING, counts) is of_itself
    assert end_of(BatchState.CANCELLING, counts) is BatchState.CANCELLED


def test_what_has_an_answer_is_output_and_what_has_none_is_not() -> None:
    for door, outcome in itertools.product(Door, LineOutcome):
        is_output = door is Door.ANTHROPIC or outcome is LineOutcome.SUCCEEDED
        assert (file_of(door, outcome) is LineFile.OUTPUT) == is_output


@given(st.text(max_size=60))
def test_no_other_text_is_the_name_of_a_batch(name: str) -> None:
    for door in Door:
        found = batches.id_in(door, name)
        assert found is None or batches.name_of(door, found) == name


@pytest.mark.parametrize("door", Door)
def test_a_name_leads_to_its_batch(door: Door) -> None:
    batch_id = new_id()

    assert batches.id_in(door, batches.name_of(door, batch_id)) == batch_id
