"""Where a job's time went: the parts add up to the whole, whatever the stamps say."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.books.timeline import Awaits, Life, Phase, Taken, Try, Use, awaits, spans, taken
from app.engines.base import Breakdown, Generation
from app.jobs import FinishReason
from app.worker.settlement import _breakdown

START = datetime(2027, 1, 31, 12, tzinfo=UTC)


def at(ms: float) -> datetime:
    return START + timedelta(milliseconds=ms)


def told(life: Life) -> list[tuple[str, float]]:
    return [(span.phase.value, span.us / 1_000) for span in spans(life)]


def life(**given: Any) -> Life:
    return Life(**{"created_at": START, "until": at(640), "sent_at": START} | given)


ANSWERED = Try(
    number=1,
    claimed_at=at(200),
    started_at=at(210),
    first_token_at=at(300),
    last_token_at=at(600),
    ended_at=at(640),
)
LOST = Try(number=1, claimed_at=at(100), ended_at=at(300))


def test_an_answered_job_was_sent_held_claimed_computed_and_committed() -> None:
    assert told(life(received_at=at(90), tries=[ANSWERED])) == [
        ("sent", 90), ("held", 110), ("claimed", 10), ("prefill", 90), ("decode", 300),
        ("commit", 40),
    ]  # fmt: skip


def test_a_job_that_was_rescued_tells_of_both_attempts_and_of_the_wait_between() -> None:
    second = Try(number=2, claimed_at=at(400), ended_at=at(640))
    job = life(tries=[LOST, second], sent_at=at(350), received_at=at(380))

    assert [(each.phase, each.attempt, each.us // 1_000) for each in spans(job)] == [
        (Phase.WAITING, None, 100),
        (Phase.RUNNING, 1, 200),
        (Phase.UNSENT, None, 50),
        (Phase.SENT, None, 30),
        (Phase.HELD, None, 20),
        (Phase.RUNNING, 2, 240),
    ]


def test_a_job_that_ended_in_the_queue_waited_all_the_time() -> None:
    assert told(life()) == [("sent", 640)]
    assert told(life(sent_at=None)) == [("unsent", 640)]
    assert told(life(sent_at=None, not_before=at(1_000))) == [("scheduled", 640)]
    assert told(life(sent_at=at(500), not_before=at(400), received_at=at(600))) == [
        ("scheduled", 400), ("unsent", 100), ("sent", 100), ("held", 40),
    ]  # fmt: skip


def test_a_job_that_is_queued_again_waits_after_its_attempt() -> None:
    job = life(tries=[LOST], waits=True, sent_at=None)

    assert told(job) == [("waiting", 100), ("running", 200), ("unsent", 340)]


def test_a_job_that_was_never_readable_took_no_time() -> None:
    assert spans(life(until=START)) == []


def test_a_clock_that_was_set_back_is_told_and_makes_nothing_negative() -> None:
    claimed_before_it_came = Try(number=1, claimed_at=at(-50), ended_at=at(640))
    first, second = spans(life(tries=[claimed_before_it_came]))

    assert (first.us, first.is_adjusted) == (0, True)
    assert (second.us, second.is_adjusted) == (640_000, False)


STAMPS = st.integers(-1_000_000, 1_000_000).map(lambda us: START + timedelta(microseconds=us))
MAYBE = st.none() | STAMPS
NS = st.integers(0, 10**15)
TRIES = st.builds(
    Try,
    number=st.just(0),
    claimed_at=STAMPS,
    ended_at=MAYBE,
    started_at=MAYBE,
    first_token_at=MAYBE,
    last_token_at=MAYBE,
    device_ns=NS,
    wasted_ns=NS,
    prefill_ns=st.none() | NS,
    recomputed_ns=NS,
    cost_nano=st.integers(0, 10**12),
    energy_nj=NS,
    wasted_nj=NS,
)


@given(
    st.builds(
        Life,
        created_at=STAMPS,
        until=STAMPS,
        tries=st.lists(TRIES, max_size=4),
        waits=st.booleans(),
        not_before=MAYBE,
        sent_at=MAYBE,
        received_at=MAYBE,
    )
)
def test_the_spans_of_any_life_lie_end_to_end_and_add_up_to_it(any_life: Life) -> None:
    parts = spans(any_life)

    whole = max(any_life.until, any_life.created_at) - any_life.created_at
    assert sum(each.us for each in parts) == whole // timedelta(microseconds=1)
    assert all(each.us >= 0 for each in parts)
    assert all(before.ended_at == after.began_at for before, after in pairwise(parts))
    assert not parts or parts[0].began_at == any_life.created_at


@given(st.lists(TRIES, max_size=4))
def test_what_was_taken_adds_up_to_what_was_billed_and_what_was_wasted(tries: list[Try]) -> None:
    parts = taken(tries)

    wasted = sum(each.ns for each in parts if each.use is Use.WASTED)
    assert wasted == sum(each.wasted_ns for each in tries)
    assert sum(each.ns for each in parts) == wasted + sum(each.device_ns for each in tries)
    assert all(each.ns > 0 for each in parts)

    billed_nano = sum(each.cost_nano or 0 for each in tries if each.device_ns)
    assert sum(each.cost_nano or 0 for each in parts) == billed_nano
    assert not any(each.cost_nano for each in parts if each.use is Use.WASTED)
    joules = sum((each.energy_nj or 0) * (each.device_ns > 0) for each in tries)
    joules += sum((each.wasted_nj or 0) * (each.wasted_ns > 0) for each in tries)
    assert sum(each.energy_nj or 0 for each in parts) == joules


def test_device_time_without_a_price_costs_what_nobody_knows() -> None:
    [billed, wasted] = taken([Try(number=1, claimed_at=START, device_ns=5, wasted_ns=5)])

    assert (billed.cost_nano, wasted.cost_nano) == (None, None)
    assert (billed.energy_nj, wasted.energy_nj) == (None, None)


def test_device_time_is_told_apart_where_the_engine_does() -> None:
    told_apart = Try(
        number=2, claimed_at=START, device_ns=100, prefill_ns=30, recomputed_ns=20, wasted_ns=7,
        cost_nano=9, energy_nj=100, wasted_nj=8,
    )  # fmt: skip

    assert taken([Try(number=1, claimed_at=START, device_ns=5), told_apart]) == [
        Taken(1, Use.COMPUTED, 5),
        Taken(2, Use.PREFILL, 30, 3, 30),
        Taken(2, Use.DECODE, 50, 4, 50),
        Taken(2, Use.RECOMPUTED, 20, 2, 20),
        Taken(2, Use.WASTED, 7, 0, 8),
    ]


ANY = st.integers(-(10**15), 10**15)


@given(NS, st.lists(st.none() | st.builds(Breakdown, ANY, ANY, ANY, ANY), max_size=3))
def test_no_more_is_told_than_there_is_whatever_engines_say(
    device_ns: int, said: list[Breakdown | None]
) -> None:
    answers = [
        Generation(place, FinishReason.STOP, breakdown=each) for place, each in enumerate(said)
    ]

    told = _breakdown(device_ns, answers)

    if not said or None in said:
        assert told == {}
    else:
        assert 0 <= told["prefill_ns"] <= device_ns - told["recomputed_ns"] <= device_ns
        assert told["preemptions"] >= 0 and told["preempted_ms"] >= 0


@pytest.mark.parametrize(
    ("job", "holder_is_up", "num_workers", "answer"),
    [
        (life(sent_at=None, not_before=at(900)), None, 1, Awaits.TIME),
        (life(sent_at=None), None, 1, Awaits.SENDING),
        (life(), None, 1, Awaits.WORKER),
        (life(), None, 0, Awaits.NO_WORKER),
        (life(sent_at=None), None, 0, Awaits.NO_WORKER),
        (life(received_at=at(1)), True, 1, Awaits.BATCH),
        (life(received_at=at(1)), False, 1, Awaits.RESCUE),
        (life(tries=[LOST]), True, 1, Awaits.ENGINE),
        (life(tries=[LOST]), False, 0, Awaits.RESCUE),
        (life(tries=[LOST], waits=True), None, 1, Awaits.WORKER),
    ],
)
def test_an_open_job_waits_for_one_thing(
    job: Life, holder_is_up: bool | None, num_workers: int, answer: Awaits
) -> None:
    assert awaits(job, holder_is_up=holder_is_up, num_workers=num_workers) is answer


def test_a_running_job_that_was_cancelled_waits_for_its_worker_to_stop_it() -> None:
    job = life(tries=[LOST])

    assert awaits(job, holder_is_up=True, num_workers=1, is_cancelled=True) is Awaits.STOP
