"""Turns at a connection: in order, handed over, and not waited for for ever."""

from __future__ import annotations

import threading
from contextlib import ExitStack

from app.store.turns import Turns
from tests.waiting import eventually


def test_who_leaves_hands_over_to_who_came_first_and_not_to_who_comes_back() -> None:
    # given one who has it, and another who waits
    turns, served = Turns(1, patience_s=10), []

    def wait() -> None:
        with turns.taken():
            served.append("the one who waited")

    with ExitStack() as mine:
        mine.enter_context(turns.taken())
        other = threading.Thread(target=wait)
        other.start()
        eventually(lambda: len(turns._line) == 1)
        # when the first leaves and comes back at once
        mine.close()
        with turns.taken():
            served.append("the one who came back")
    other.join()
    # then
    assert served == ["the one who waited", "the one who came back"]


def test_who_has_waited_for_too_long_goes_on_and_takes_nobodys_turn() -> None:
    # given
    turns = Turns(1, patience_s=0.01)
    with turns.taken(), turns.taken():
        pass
    # then it is free, once
    assert turns._free == 1
    assert not turns._line


def test_an_error_gives_the_turn_back() -> None:
    turns = Turns(1, patience_s=60)
    try:
        with turns.taken():
            raise ValueError
    except ValueError:
        pass

    assert turns._free == 1
