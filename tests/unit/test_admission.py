"""How much may wait, and when who is refused is told to come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import QueueFull
from app.intake import admission
from app.intake.admission import (
    COUNT_EVERY_S,
    COUNT_FULL_S,
    COUNT_SHARE,
    DRAIN_WINDOW_S,
    MAX_COUNT_AGE_S,
    MAX_RETRY_AFTER_S,
    Admission,
)
from app.store.counts import Load


class Postgres:
    """In place of a database: what is queued, and what ended within the window."""

    def __init__(self) -> None:
        self.queued = Load(0, 0)
        self.ended = Load(0, 0)
        self.num_counts = 0
        self.while_counting: Callable[[], None] = lambda: None

    @contextmanager
    def begin(self) -> Iterator[Postgres]:
        yield self


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    def queued(postgres: Postgres) -> Load:
        postgres.num_counts += 1
        postgres.while_counting()
        return postgres.queued

    monkeypatch.setattr(admission.counts, "queued", queued)
    monkeypatch.setattr(admission.counts, "ended", lambda postgres, window_s: postgres.ended)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        monkeypatch.setattr(admission.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def postgres() -> Postgres:
    return Postgres()


def gate(postgres: Postgres, jobs: int = 100, tokens: int = 10_000) -> Admission:
    return Admission(postgres, Load(jobs, tokens))  # type: ignore[arg-type]


def admit(gate: Admission, jobs: int, tokens: int) -> None:
    with gate.admitted(Load(jobs, tokens)):
        pass


def refused(gate: Admission, jobs: int = 1, tokens: int = 10) -> int:
    """The seconds after which whoever asks for so much is to come back."""
    with pytest.raises(QueueFull) as refusal:
        admit(gate, jobs, tokens)
    return refusal.value.retry_after


def test_a_full_queue_takes_no_more_jobs(postgres: Postgres, clock: Clock) -> None:
    postgres.queued = Load(95, 0)
    admission = gate(postgres)

    admit(admission, 3, 0)
    admit(admission, 2, 0)  # what was let in counts, before it is counted in Postgres

    refused(admission)


def test_tokens_fill_a_queue_as_well_as_jobs_do(postgres: Postgres, clock: Clock) -> None:
    postgres.queued = Load(3, 9_000)
    admission = gate(postgres)

    admit(admission, 1, 1_000)

    with pytest.raises(QueueFull, match="10000 tokens"):
        admit(admission, 1, 1)


def test_asking_for_room_takes_none(postgres: Postgres, clock: Clock) -> None:
    postgres.queued = Load(98, 0)
    admission = gate(postgres)

    for _ in range(10):
        admission.expect_room(2)

    with pytest.raises(QueueFull, match="100 jobs"):
        admission.expect_room(3)
    admit(admission, 2, 0)


def test_room_is_seen_again_when_the_queue_has_shrunk(postgres: Postgres, clock: Clock) -> None:
    postgres.queued = Load(100, 0)
    admission = gate(postgres)
    refused(admission)

    postgres.queued = Load(10, 0)
    clock.now += COUNT_EVERY_S

    admit(admission, 1, 1)


def test_before_anybody_is_refused_the_queue_is_counted_again(
    postgres: Postgres, clock: Clock
) -> None:
    admission = gate(postgres)
    admit(admission, 100, 0)
    refused(admission)

    clock.now += COUNT_FULL_S

    admit(admission, 100, 0)  # the others are with a worker already
    assert postgres.num_counts == 2


def test_many_submissions_share_one_count(postgres: Postgres, clock: Clock) -> None:
    admission = gate(postgres)

    for _ in range(50):
        admit(admission, 1, 1)

    assert postgres.num_counts == 1


def test_what_is_let_in_during_a_count_is_not_forgotten(postgres: Postgres, clock: Clock) -> None:
    admission = gate(postgres)
    admit(admission, 1, 0)
    clock.now += COUNT_EVERY_S
    postgres.while_counting = lambda: admit(admission, 90, 0)

    admit(admission, 1, 0)

    refused(admission, jobs=10)


def test_what_is_written_while_it_is_counted_is_not_forgotten(
    postgres: Postgres, clock: Clock
) -> None:
    admission = gate(postgres)
    with admission.admitted(Load(90, 0)):
        clock.now += COUNT_EVERY_S
        admit(admission, 1, 0)  # the count does not see the ninety: they are not committed

        refused(admission, jobs=10)
    refused(admission, jobs=10)
    admit(admission, 9, 0)


def test_nobody_counts_while_another_does(postgres: Postgres, clock: Clock) -> None:
    admission = gate(postgres)

    def meanwhile() -> None:
        clock.now += 2 * COUNT_EVERY_S
        admit(admission, 60, 0)

    postgres.while_counting = meanwhile
    admit(admission, 30, 0)

    assert postgres.num_counts == 1
    refused(admission, jobs=11)


def test_a_count_that_takes_long_is_made_less_often(postgres: Postgres, clock: Clock) -> None:
    def take_a_while() -> None:
        clock.now += 0.2

    postgres.while_counting = take_a_while
    admission = gate(postgres)
    admit(admission, 1, 0)

    clock.now += 0.2 * COUNT_SHARE - 0.4
    admit(admission, 1, 0)
    assert postgres.num_counts == 1

    clock.now += 0.4
    admit(admission, 1, 0)
    assert postgres.num_counts == 2


def test_a_count_that_was_slow_for_once_is_soon_made_again(
    postgres: Postgres, clock: Clock
) -> None:
    def take_a_minute() -> None:
        clock.now += 60.0

    postgres.while_counting = take_a_minute
    admission = gate(postgres)
    admit(admission, 1, 0)

    clock.now += MAX_COUNT_AGE_S
    admit(admission, 1, 0)

    assert postgres.num_counts == 2


def test_each_who_is_refused_gets_a_turn_at_the_pace_of_the_drain(
    postgres: Postgres, clock: Clock
) -> None:
    postgres.queued = Load(100, 0)
    postgres.ended = Load(int(0.5 * DRAIN_WINDOW_S), 0)  # one job in two seconds
    admission = gate(postgres)

    assert [refused(admission, tokens=0) for _ in range(4)] == [2, 4, 6, 8]

    clock.now += 8
    assert refused(admission, tokens=0) == 2


def test_the_slower_of_jobs_and_tokens_says_when(postgres: Postgres, clock: Clock) -> None:
    postgres.queued = Load(100, 0)
    postgres.ended = Load(int(100 * DRAIN_WINDOW_S), int(50 * DRAIN_WINDOW_S))
    admission = gate(postgres)

    assert refused(admission, jobs=1, tokens=1_000) == 20


def test_while_nothing_drains_everybody_is_told_the_longest_pause(
    postgres: Postgres, clock: Clock
) -> None:
    postgres.queued = Load(100, 0)
    admission = gate(postgres)

    assert refused(admission) == MAX_RETRY_AFTER_S


@given(
    asked=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 9_000)), max_size=30),
    ended=st.tuples(st.integers(0, 10_000), st.integers(0, 10**7)),
)
def test_the_limits_hold_and_pauses_are_whole_seconds_within_bounds(
    asked: list[tuple[int, int]], ended: tuple[int, int]
) -> None:
    postgres = Postgres()
    postgres.ended = Load(*ended)
    admission = gate(postgres)
    let_in = [0, 0]
    pauses = []
    for jobs, tokens in asked:
        try:
            admit(admission, jobs, tokens)
        except QueueFull as refusal:
            pauses.append(refusal.retry_after)
        else:
            let_in[0] += jobs
            let_in[1] += tokens
    assert all(isinstance(pause, int) and 1 <= pause <= MAX_RETRY_AFTER_S for pause in pauses)
    assert let_in[0] <= 100
    assert let_in[1] <= 10_000
