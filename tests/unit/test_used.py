"""What jobs took of the device is told to the broker, however Redis is."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest

from app.broker.lanes import Used
from app.errors import Unavailable
from app.worker import used as telling
from app.worker.used import UsedTeller, Whose
from tests.waiting import eventually

MILL: Whose = ("stub", 0, "mill")
BAKERY: Whose = ("stub", 0, "bakery")


class Redis:
    """In place of a publisher: away as often as a test says."""

    def __init__(self, times_away: int = 0) -> None:
        self.times_away = times_away
        self.told: dict[Whose, Used] = {}
        self.has_all = threading.Event()
        self.expects = Used()

    def note_used(self, used: Mapping[Whose, Used]) -> None:
        if self.times_away:
            self.times_away -= 1
            raise Unavailable("Redis does not answer.")
        for whose, each in used.items():
            self.told[whose] = self.told.get(whose, Used()) + each
        if sum(self.told.values(), Used()) == self.expects:
            self.has_all.set()


@pytest.mark.parametrize("times_away", [0, 2])
def test_all_that_is_noted_is_told_once(monkeypatch: pytest.MonkeyPatch, times_away: int) -> None:
    monkeypatch.setattr(telling, "PAUSE_S", 0.001)
    redis = Redis(times_away)
    redis.expects = Used(4, 3, 600)
    teller = UsedTeller(redis.note_used)
    teller.start()

    for ns in (100, 200):
        teller.note(MILL, Used(1, 1, ns))
    teller.note(BAKERY, Used(1, 1, 300))
    teller.note(BAKERY, Used(ended=1))

    assert redis.has_all.wait(30)
    teller.stop()
    assert redis.told == {MILL: Used(2, 2, 300), BAKERY: Used(2, 1, 300)}


def test_a_redis_that_stays_away_is_tried_ever_more_seldom_until_it_is_back() -> None:
    redis, pauses = Redis(times_away=10), list[float]()
    redis.expects = Used(1, 1, 100)
    teller = UsedTeller(redis.note_used)
    teller._stopping.wait = pauses.append  # type: ignore[assignment, method-assign]
    teller.note(MILL, Used(1, 1, 100))
    teller.start()

    assert redis.has_all.wait(30)
    teller.note(MILL, Used(1, 1, 100))
    eventually(lambda: len(pauses) == 12)
    teller.stop()
    assert pauses == [*sorted(pauses[:11]), telling.PAUSE_S]
    assert pauses[10] == telling.MAX_PAUSE_S


def test_jobs_that_end_while_it_pauses_are_told_with_those_before() -> None:
    # given
    tellings: list[Mapping[Whose, Used]] = []
    teller = UsedTeller(tellings.append)

    def pause(_: float) -> None:
        if not tellings:
            teller.note(MILL, Used(1, 1, 200))

    teller._stopping.wait = pause  # type: ignore[assignment, method-assign]
    # when
    teller.note(MILL, Used(1, 1, 100))
    teller.start()
    # then
    eventually(lambda: tellings)
    teller.stop()
    assert tellings == [{MILL: Used(2, 2, 300)}]
