"""The clock of an engine process: its parts add up to the time that it was up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from app.worker.engine.hours import Hours
from app.worker.engine.page import PAGE_BYTES, Clock, Phase, Totals, shown

moves = st.lists(
    st.tuples(st.sampled_from(Phase), st.integers(0, 10**9), st.integers(0, 10**9), st.booleans()),
    max_size=30,
)


@given(moves)
def test_the_parts_add_up_to_the_time_since_the_spawn_and_none_is_negative(
    moves: list[tuple[Phase, int, int, bool]],
) -> None:
    clock, now_ns, gave = Clock(1_000), 1_000, 0

    for phase, lasts_ns, given_ns, in_vain in moves:
        now_ns, gave = now_ns + lasts_ns, gave + given_ns
        clock.turn(phase, now_ns, given_ns, in_vain=in_vain)

    assert clock.totals.up == now_ns - 1_000
    assert clock.given == gave
    assert min(clock.totals.load, clock.totals.idle, clock.totals.overhead, clock.owed) >= 0


def test_a_step_that_does_not_end_is_waste_and_what_it_had_given_before_is_not() -> None:
    clock = Clock(0, Phase.STEP)

    assert clock.turn(Phase.STEP, 10, given=4, in_vain=True) == 6

    assert clock.totals == Totals(busy=4, waste=6)


def test_the_page_holds_the_last_whole_copy() -> None:
    page = bytearray(PAGE_BYTES)
    for stamp_ns in range(5):
        Clock(stamp_ns, Phase.IDLE, idle=stamp_ns).show(page)

    # when the next write is broken off before its number
    broken = bytearray(page)
    Clock(9, Phase.STEP).show(broken)
    broken[16:24] = page[16:24]

    assert shown(page) == shown(broken) == Clock(4, Phase.IDLE, idle=4)


def test_a_kill_loses_no_time_and_the_next_process_goes_on_where_it_was() -> None:
    # given a process that was killed in the middle of a step
    now = [0]
    hours, page = Hours(lambda: now[0]), bytearray(PAGE_BYTES)
    hours.begin(page)
    clock = shown(page)
    clock.turn(Phase.STEP, 5)
    clock.turn(Phase.STEP, 15, given=7)
    clock.show(page)
    now[0] = 35
    hours.end(was_busy=True)

    # when another one is started a while later, and loads
    now[0] = 40
    hours.begin(bytearray(PAGE_BYTES))
    now[0] = 50

    assert hours.spent_ns == 27
    assert hours.read() == Totals(load=15, busy=7, waste=20, overhead=8)
    assert hours.read().up == 50
