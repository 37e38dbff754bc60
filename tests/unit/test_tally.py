"""What jobs took of the device is told to the broker once, however Redis is."""

from __future__ import annotations

from typing import Any

import pytest

from app.broker import tally as tallies
from app.broker.lanes import Used, Whose
from app.broker.queues import Layout
from app.broker.tally import PAUSE_S, Tally

MILL: Whose = ("stub", 0, "mill")
BAKERY: Whose = ("stub", 0, "bakery")


class Pipe:
    """In place of a pipeline."""

    def __init__(self) -> None:
        self.commands: list[tuple[Any, ...]] = []

    def eval(self, *words: Any) -> None:
        self.commands.append(words)


@pytest.fixture
def tally() -> Tally:
    return Tally(Layout())


def test_all_that_is_noted_is_told_once_and_in_one_command(
    tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    for ns in (100, 200):
        tally.note(MILL, Used(1, 1, ns))
    tally.note(BAKERY, Used(1, 1, 300))
    tally.note(BAKERY, Used(ended=1))
    pipe = Pipe()
    monkeypatch.setattr(tallies, "PAUSE_S", 0)
    # when
    told, again = tally.tell(pipe), tally.tell(pipe)
    # then
    assert told == {MILL: Used(2, 2, 300), BAKERY: Used(2, 1, 300)}
    assert again == {}
    assert len(pipe.commands) == 1


def test_what_was_not_heard_is_told_with_what_ends_meanwhile(
    tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    monkeypatch.setattr(tallies, "PAUSE_S", 0)
    tally.note(MILL, Used(1, 1, 100))
    lost = tally.tell(Pipe())
    # when
    tally.note(MILL, Used(1, 1, 200))
    tally.keep(lost)
    # then
    assert tally.tell(Pipe()) == {MILL: Used(2, 2, 300)}


def test_it_is_told_only_when_a_while_has_passed_since_the_last_time(
    tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given
    now = 1_000.0
    monkeypatch.setattr(tallies.time, "monotonic", lambda: now)
    assert not tally.is_due  # nothing is noted
    tally.note(MILL, Used(1, 1, 100))
    assert tally.is_due
    tally.keep(tally.tell(Pipe()))
    # when
    now += PAUSE_S / 2
    # then
    assert not tally.is_due
    assert tally.tell(Pipe()) == {}
    now += PAUSE_S / 2
    assert tally.tell(Pipe()) == {MILL: Used(1, 1, 100)}
