"""What a reader of a job's stream is told: no gap, no repeat, and a restart where there was one."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.broker.events import Entry, EventId, Reading, Started, Tokens, Whole, decode, encode
from app.engines.base import TokenLogprob

BATCH = UUID(int=7)

texts = st.text(max_size=5)
tokens = st.builds(
    Tokens,
    st.integers(0, 3),
    texts,
    st.lists(st.integers(0, 2**31), max_size=3).map(tuple),
    st.lists(
        st.builds(
            TokenLogprob,
            st.integers(0, 9),
            st.floats(-99, 0),
            st.lists(st.tuples(st.integers(0, 9), st.floats(-99, 0)), max_size=2).map(tuple),
        ),
        max_size=2,
    ).map(tuple),
)


@given(st.one_of(tokens, st.just(Whole()), st.builds(Started, st.uuids(), st.integers(1, 99))))
def test_what_is_written_is_read(told: Tokens | Whole | Started) -> None:
    assert decode(encode(told)) == told


@given(st.one_of(st.text(max_size=20), st.binary(max_size=20), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=6,
).map(str)))  # fmt: skip
def test_what_others_wrote_is_nothing_or_an_event_and_never_an_error(text: str | bytes) -> None:
    told = decode(text)
    assert told is None or isinstance(told, Tokens | Whole | Started)


@pytest.mark.parametrize("text", ["[0,1]", '["x",1]', '[0,"a",["x"]]', '[0,"a",[1],[[1]]]', "{}"])
def test_a_later_versions_event_is_none_here(text: str) -> None:
    assert decode(text) is None


@given(st.builds(EventId, st.integers(0, 10**9 - 1), st.integers(0, 10**15 - 1)))
def test_an_id_is_read_as_it_is_written(id: EventId) -> None:
    assert EventId.read(str(id)) == id


# ── a job that is begun again and again, and a listener that is cut off again and again ─────────

runs = st.lists(
    st.tuples(st.booleans(), st.lists(texts, max_size=6)),  # in a new attempt?, its texts
    min_size=1,
    max_size=4,
)


def written(history: list[tuple[bool, list[str]]], *, is_over: bool = True) -> list[Entry]:
    """A stream as workers write it."""
    entries: list[Entry] = []
    id = EventId(1, 0)
    for number, (is_new, run) in enumerate(history):
        if number and is_new:
            id = EventId(id.attempt + 1, 0)
        told = [Started(BATCH, 1), *(Tokens(0, text) for text in run)]
        if is_over and number == len(history) - 1:
            told.append(Whole())
        for each in told:
            entries.append(Entry(id, each))
            id = id.next
    return entries


def told_text(entries: list[Entry]) -> str:
    text = ""
    for each in entries:
        if isinstance(each.told, Started):
            text = ""
        elif isinstance(each.told, Tokens):
            text += each.told.text
    return text


@given(runs, st.data())
def test_a_listener_that_is_cut_off_has_no_gap_and_no_repeat(
    history: list[tuple[bool, list[str]]], data: st.DataObject
) -> None:
    # given a stream, and a listener that is cut off and comes back with the last id that it had,
    # to a server that reads it by pages of any size, some of them twice
    stream = written(history)
    had: list[Entry] = []
    num_written = 0
    reading = Reading()
    while not (num_written == len(stream) and reading.is_whole):
        if data.draw(st.booleans(), "is cut off"):
            reading = Reading(had[-1].id if had else None)
        num_written = data.draw(st.integers(num_written, len(stream)), "written by now")
        page = data.draw(st.integers(1, 4), "page")
        again = data.draw(st.integers(0, 2), "entries read twice")
        after = reading.after
        new = [at for at in range(num_written) if after is None or stream[at].id > after]
        if not new:
            num_written = min(num_written + 1, len(stream))
            continue
        begin = max(0, new[0] - again)
        had += reading.take(stream[begin : new[0] + page])
        assert not reading.has_gap

    # then ids grow, and the text of what it had since the last start is the answer's
    assert [each.id for each in had] == sorted({each.id for each in had})
    assert told_text(had) == "".join(history[-1][1])


@given(runs, st.data())
def test_what_is_missing_is_noticed_and_no_text_with_a_hole_is_told(
    history: list[tuple[bool, list[str]]], data: st.DataObject
) -> None:
    # given a stream of which any events are lost
    stream = written(history)
    lost = data.draw(st.sets(st.sampled_from(range(len(stream)))), "lost")
    left = [each for at, each in enumerate(stream) if at not in lost]

    reading = Reading()
    had = list(reading.take(left))

    # then it says that it is whole only if nothing of the last run is missing, and what is told of
    # a run is its beginning
    last = len(stream) - 2 - len(history[-1][1])  # where that begins
    assert reading.is_whole == all(at < last for at in lost)
    starts = [at for at, each in enumerate(had) if isinstance(each.told, Started)]
    assert all(at == 0 for at in starts)
    if had:
        assert isinstance(had[0].told, Started)
        run = had[0].id.attempt, had[0].id.number
        begun = next(at for at, each in enumerate(stream) if tuple(each.id) == run)
        assert had == stream[begun : begun + len(had)]


def test_an_attempt_that_has_lost_its_job_is_not_listened_to() -> None:
    # given a reader that has been told of the second attempt
    reading = Reading()
    second = [Entry(EventId(2, 0), Started(BATCH, 1)), Entry(EventId(2, 1), Tokens(0, "a"))]
    assert list(reading.take(second)) == second

    # when the first one's last words come
    late = [Entry(EventId(1, n), Tokens(0, "z")) for n in range(9)]

    assert list(reading.take(late)) == []
    assert reading.after == EventId(2, 1) and not reading.has_gap
