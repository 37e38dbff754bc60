"""When a worker is taken for one that has stopped consuming."""

from __future__ import annotations

from typing import Any, cast

from app.errors import Unavailable
from app.worker.watchdog import LOOKS, Watchdog


class Scene:
    """A worker and its queues, as the watchdog sees them."""

    def __init__(self) -> None:
        self.waiting: int | None = 5
        self.received, self.held = 0, False
        self.turned_ns = 0
        self.waits_for_database = False
        self.answers = True
        self.dog = Watchdog(
            backlog=self._backlog,
            runner=cast(Any, self),
            lease=cast(Any, self),
            stall_timeout_s=60,
            lease_s=30,
        )

    def facts(self) -> dict[str, object]:
        return {"received": self.received, "held": self.held}

    def database_answers(self) -> bool:
        return self.answers

    def _backlog(self) -> int:
        if self.waiting is None:
            raise Unavailable
        return self.waiting

    def looks(self, number: int) -> bool:
        return [self.dog.has_stalled() for _ in range(number)][-1]


def test_a_worker_that_takes_nothing_of_what_waits_has_stalled() -> None:
    scene = Scene()

    assert not scene.looks(LOOKS)  # the first only learns what was received before
    assert scene.looks(1)


def test_a_worker_that_receives_or_holds_anything_has_not() -> None:
    scene = Scene()
    scene.looks(LOOKS)

    scene.received += 1
    assert not scene.looks(LOOKS)
    scene.held = True
    assert not scene.looks(2 * LOOKS)


def test_an_empty_queue_and_a_redis_that_is_away_are_no_stall() -> None:
    scene = Scene()
    scene.waiting = 0
    assert not scene.looks(2 * LOOKS)
    scene.waiting = None
    assert not scene.looks(2 * LOOKS)

    scene.waiting = 1
    assert not scene.looks(LOOKS - 1)
    assert scene.looks(1)


def stands_still(scene: Scene, looks: int) -> bool:
    return [scene.dog.stands_still() for _ in range(looks)][-1]


def test_a_runner_that_does_not_turn_for_longer_than_its_lease_stands_still() -> None:
    scene = Scene()
    scene.turned_ns = 1

    assert not stands_still(scene, LOOKS + 1)  # the first look only learns where it was
    assert stands_still(scene, 1)
    scene.turned_ns = 2
    assert not stands_still(scene, LOOKS + 1)


def test_a_runner_that_waits_for_postgres_does_so_as_all_do() -> None:
    scene = Scene()
    scene.turned_ns, scene.waits_for_database = 1, True
    scene.answers = False

    assert not stands_still(scene, 100)
    scene.answers = True  # but if others get their answers, it will never get its own
    assert stands_still(scene, 1)
