"""Ends wait for others in the engine process, and never long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from app.engines.base import Generation
from app.jobs import FinishReason
from app.worker.engine.ends import LONGEST_NS, PART, ROWS, Ends

MS = 1_000_000
MAX_ROWS = 64


def end(number: int, *, at_ns: int, lasted_ns: int, cut_short: bool = False) -> Generation:
    reason = FinishReason.CANCELLED if cut_short else FinishReason.LENGTH
    return Generation(number, reason, started_ns=at_ns - lasted_ns, finished_ns=at_ns)


def told(*, at_ns: int) -> Ends:
    """Some were told before."""
    ends = Ends(MAX_ROWS, joins=True)
    ends.add([end(0, at_ns=at_ns, lasted_ns=0)], {})
    assert ends.take(at_ns)
    return ends


def test_an_end_is_told_at_once_if_no_other_was_a_part_of_its_time_ago_or_long_ago() -> None:
    second = 1_000 * MS
    for lasted_ns, pause_ns in ((second, second // PART), (100 * second, LONGEST_NS)):
        ends = told(at_ns=200 * second)
        ends.add([end(1, at_ns=200 * second + pause_ns, lasted_ns=lasted_ns)], {})
        assert ends.are_due(200 * second + pause_ns, 5)

        ends = told(at_ns=200 * second)
        ends.add([end(1, at_ns=200 * second + 1, lasted_ns=lasted_ns)], {})
        assert not ends.are_due(200 * second + pause_ns - 1, 5)
        assert ends.are_due(200 * second + pause_ns, 5)
        assert [each.sequence_id for each in ends.take(200 * second + pause_ns)] == [1]
        assert not ends.are_due(1_000 * second, 5)


def test_the_time_that_it_waited_here_before_it_began_counts() -> None:
    # given two that ran for a second, and of which one had waited for nine
    waited, came_at_once = told(at_ns=20_000 * MS), told(at_ns=20_000 * MS)
    waited.add([end(1, at_ns=20_000 * MS, lasted_ns=1_000 * MS)], {1: 10_000 * MS})
    came_at_once.add([end(1, at_ns=20_000 * MS, lasted_ns=1_000 * MS)], {1: 19_000 * MS})

    # then the other one is told sooner
    sooner_ns, later_ns = 20_000 * MS + 1_000 * MS // PART, 20_000 * MS + LONGEST_NS
    assert came_at_once.are_due(sooner_ns, 5)
    assert not waited.are_due(later_ns - 1, 5)
    assert waited.are_due(later_ns, 5)


def test_one_that_is_due_takes_all_others_along() -> None:
    ends = told(at_ns=9_000 * MS)
    ends.add([end(1, at_ns=9_000 * MS, lasted_ns=9_000 * MS)], {})
    ends.add([end(2, at_ns=9_001 * MS, lasted_ns=PART * 10 * MS)], {})

    assert not ends.are_due(9_010 * MS - 1, 5)
    assert ends.are_due(9_010 * MS, 5)
    assert [each.sequence_id for each in ends.take(9_010 * MS)] == [1, 2]

    # and so does the first of them, if that is sooner
    ends.add([end(3, at_ns=9_010 * MS, lasted_ns=PART * 10 * MS)], {})
    ends.add([end(4, at_ns=9_011 * MS, lasted_ns=9_000 * MS)], {})
    assert ends.are_due(9_020 * MS, 5)


def test_who_is_watched_or_cut_short_or_cannot_be_joined_or_is_the_last_waits_for_nobody() -> None:
    long_ago = {"at_ns": 9_000 * MS, "lasted_ns": 9_000 * MS}

    watched = told(at_ns=9_000 * MS)
    watched.add([end(1, **long_ago)], {})
    watched.add([end(2, **long_ago)], {}, are_watched=True)
    cut_short = told(at_ns=9_000 * MS)
    cut_short.add([end(1, **long_ago)], {})
    cut_short.add([end(2, cut_short=True, **long_ago)], {})
    static = Ends(MAX_ROWS, joins=False)
    static.add([end(0, **long_ago)], {})
    static.take(9_000 * MS)
    static.add([end(1, **long_ago)], {})
    last = told(at_ns=9_000 * MS)
    last.add([end(1, **long_ago)], {})

    assert watched.are_due(9_000 * MS, 5)
    assert cut_short.are_due(9_000 * MS, 5)
    assert static.are_due(9_000 * MS, 5)
    assert last.are_due(9_000 * MS, 0)


def test_of_a_full_engine_ends_keep_few_rows_from_others() -> None:
    # given an engine that is full as far as its worker knows
    ends = told(at_ns=9_000 * MS)
    for number in range(MAX_ROWS // ROWS):
        ends.add([end(number, at_ns=9_000 * MS, lasted_ns=9_000 * MS)], {})
        assert not ends.are_due(9_000 * MS, MAX_ROWS - number - 1)

    ends.add([end(99, at_ns=9_000 * MS, lasted_ns=9_000 * MS)], {})

    assert ends.are_due(9_000 * MS, MAX_ROWS - MAX_ROWS // ROWS - 1)
    # and where it has room as far as its worker knows, nobody waits for it
    assert not ends.are_due(9_000 * MS, MAX_ROWS // 2)


@given(
    st.integers(1, 128),
    st.lists(st.tuples(st.integers(1, 60_000 * MS), st.booleans()), min_size=1, max_size=200),
    st.integers(1, 300 * MS),
)
def test_each_end_is_told_once_and_in_time(
    max_rows: int, sequences: list[tuple[int, bool]], step_ns: int
) -> None:
    # given rows that run until the next step after their time, as many at once as there is room
    ends = Ends(max_rows, joins=True)
    waiting = list(enumerate(sequences))
    inside: dict[int, tuple[int, int, bool]] = {}
    untold, heard, now_ns = dict[int, Generation](), list[int](), 10**15
    while waiting or inside or untold:
        while waiting and len(inside) + len(untold) < max_rows:
            number, (lasts_ns, cut_short) = waiting.pop(0)
            inside[number] = (now_ns, now_ns + lasts_ns, cut_short)

        # when a step ends
        now_ns += max(step_ns, min((until for _, until, _ in inside.values())) - now_ns)
        for number, (began_ns, until_ns, cut_short) in list(inside.items()):
            if until_ns <= now_ns:
                del inside[number]
                ended = end(number, at_ns=now_ns, lasted_ns=now_ns - began_ns, cut_short=cut_short)
                untold[number] = ended
                ends.add([ended], {})
        if ends.are_due(now_ns, len(inside)):
            for each in ends.take(now_ns):
                heard.append(untold.pop(each.sequence_id).sequence_id)

        # then nobody is kept whose time has come, and few of a full engine are kept at all
        for each in untold.values():
            assert inside
            assert not each.is_cut_short
            assert now_ns < each.finished_ns + LONGEST_NS
        if len(inside) + len(untold) >= max_rows:
            assert len(untold) <= max_rows // ROWS
    assert sorted(heard) == list(range(len(sequences)))
