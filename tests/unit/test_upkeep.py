"""The rules of looking after a part: a state machine on a simulated clock against any process."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from app.local.upkeep import MAX_BACKOFF_S, MAX_STEP_S, MIN_BACKOFF_S, STEADY_S, Answer, Upkeep

START_S, HANG_S = 60.0, 30.0
ANSWERS = st.sampled_from([Answer.READY, Answer.ALIVE, Answer.SILENT, None])


class AnyPart(RuleBasedStateMachine):
    """A part that starts, answers, is silent and ends as it likes, looked at as `Watched` does."""

    @initialize()
    def begin(self) -> None:
        self.now_s = 0.0
        self.state = Upkeep(START_S, HANG_S)
        self.is_up = False  #: the process
        self.good_s = 0.0  #: when it last said something, or could not be asked, or was started
        self.backoffs: list[float] = []

    @rule(seconds=st.floats(0.1, 100))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(can_start=st.booleans())
    def look_at_one_that_is_down(self, can_start: bool) -> None:
        if not self.state.should_start(self.now_s):
            return
        assert not self.is_up  # never two at once
        if can_start:
            self.is_up, self.good_s = True, self.now_s
            self.state = self.state.started(self.now_s)
        else:
            self._down()

    @rule()
    def it_ends(self) -> None:
        if self.is_up:
            self.is_up = False
            self._down()

    @rule(answer=ANSWERS, times=st.integers(1, 8))
    def it_is_asked(self, answer: Answer | None, times: int) -> None:
        for _ in range(times if self.is_up else 0):
            self.now_s += 5
            self.state = self.state.answered(answer, self.now_s)
            if answer is not Answer.SILENT:
                self.good_s = self.now_s
            if self.state.is_hung:
                assert self.now_s - self.good_s >= HANG_S  # never sooner, and never one that speaks
                self.state = self.state.killed()
                assert not self.state.should_start(self.now_s + 1e9)  # before it is gone
                self.it_ends()
                return

    @rule()
    def all_is_well_from_now_on(self) -> None:
        self.now_s += MAX_BACKOFF_S
        if not self.is_up:
            self.look_at_one_that_is_down(True)
        self.it_is_asked(Answer.READY, 1)

        assert self.state.is_running
        assert not self.state.is_hung
        assert self.state.silent_s == 0

    @invariant()
    def it_is_running_as_far_as_is_known_exactly_if_it_runs(self) -> None:
        assert self.state.is_running == self.is_up

    @invariant()
    def it_starts_again_within_the_longest_backoff(self) -> None:
        if not self.is_up:
            assert self.state.should_start(self.now_s + MAX_BACKOFF_S)

    def _down(self) -> None:
        self.state = self.state.ended(self.now_s)
        assert MIN_BACKOFF_S <= self.state.backoff_s <= MAX_BACKOFF_S
        assert not self.state.should_start(self.now_s)  # never in a busy loop


AnyPart.TestCase.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)
test_any_part_is_started_again_and_killed_only_for_silence = AnyPart.TestCase


def _silent_for(state: Upkeep, times: int, step_s: float = 5.0) -> Upkeep:
    for _ in range(times):
        state = state.answered(Answer.SILENT, state.asked_s + step_s)
    return state


@pytest.mark.parametrize(
    ("last", "limit_s"),
    [(None, START_S), (Answer.ALIVE, HANG_S), (Answer.READY, HANG_S)],
    ids=["has never answered", "was not ready", "was ready"],
)
def test_a_part_that_says_nothing_is_hung_after_its_limit(last: Answer | None, limit_s: float):
    state = Upkeep(START_S, HANG_S).started(0).answered(last, 1)

    assert not _silent_for(state, int(limit_s / 5)).is_hung
    assert _silent_for(state, int(limit_s / 5) + 1).is_hung


def test_a_machine_that_slept_for_a_day_blames_nobody():
    state = Upkeep(START_S, HANG_S).started(0).answered(Answer.READY, 1)

    woken = _silent_for(state, 1, step_s=86_400)

    assert woken.silent_s == MAX_STEP_S
    assert not woken.is_hung


def test_a_part_that_ran_steadily_begins_anew_with_the_shortest_backoff():
    state = Upkeep(START_S, HANG_S)
    for _ in range(9):
        state = state.started(state.since_s).ended(state.since_s)
    tired_s = state.backoff_s

    rested = state.started(0).ended(STEADY_S + 1)

    assert (tired_s, rested.backoff_s) == (MAX_BACKOFF_S, MIN_BACKOFF_S)
