"""Looking after parts: nothing raises, nothing waits, what hangs is ended and started again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from app.errors import ConfigError, Unavailable
from app.local.upkeep import MAX_BACKOFF_S, Answer
from app.local.watch import Watched
from tests.waiting import eventually


class FakePart:
    """A part whose start and end the test decides."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.exit_code: int | None = None
        self.starts = 0
        self.prepares: Callable[[], None] = lambda: None
        self.trouble: Exception | None = None
        self.dies = True

    def prepare(self) -> None:
        self.prepares()

    def launch(self) -> None:
        if self.trouble is not None:
            raise self.trouble
        self.starts, self.exit_code = self.starts + 1, None

    def kill(self) -> None:
        if self.dies:
            self.exit_code = -9


class Clock:
    """Looks at parts, a second a look."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.told: list[str] = []
        self.answers: dict[str, Callable[[], Answer | None]] = {}
        self.watched: list[Watched] = []

    def add(self, name: str) -> FakePart:
        part = FakePart(name)
        self.answers[name] = lambda: Answer.READY
        watched = Watched(part, lambda: self._answer(name), self.told.append, start_s=60, hang_s=30)
        watched.has_started(self.now_s)
        self.watched.append(watched)
        return part

    def _answer(self, name: str) -> Answer | None:
        return self.answers[name]()

    def look(self) -> bool:
        """Once; may be waited for, since answers come from threads."""
        self.now_s += 1
        for watched in self.watched:
            watched.look(self.now_s)
        return False

    def until(self, happened: Callable[[], bool]) -> None:
        eventually(lambda: self.look() or happened())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """What comes at the end of the test alone."""
    event = threading.Event()
    yield event
    event.set()


TROUBLES = [
    Unavailable("Postgres could not make /data:\ninitdb: error: No space left on device"),
    Unavailable("Redis cannot have port 7000 of 127.0.0.1: Address already in use."),
    ConfigError("/data was made by PostgreSQL 17"),
    OSError(28, "No space left on device", "/logs/api.log"),
    RuntimeError("a bug of ours"),
]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: type(trouble).__name__)
@pytest.mark.parametrize("where", ["prepare", "launch"])
def test_a_part_that_cannot_start_is_told_in_a_line_tried_again_and_takes_nothing_down(
    clock: Clock, trouble: Exception, where: str
):
    part, other = clock.add("Postgres"), clock.add("api")
    part.exit_code = 1

    def fail() -> None:
        raise trouble

    if where == "prepare":
        part.prepares = fail
    else:
        part.trouble = trouble
    clock.until(lambda: sum("cannot start" in line for line in clock.told) >= 3)
    part.prepares, part.trouble = (lambda: None), None
    clock.until(lambda: part.starts == 1)

    assert other.starts == 0
    assert not [line for line in clock.told if "\n" in line or "a bug of ours" in line]


def test_looking_after_one_part_keeps_no_other_waiting(clock: Clock, never: threading.Event):
    slow_to_start, slow_to_answer, other = map(clock.add, ["Postgres", "worker", "api"])
    slow_to_start.prepares = lambda: bool(never.wait()) and None
    slow_to_start.exit_code = 1
    clock.answers["worker"] = lambda: Answer.READY if never.wait() else None
    clock.until(lambda: "Postgres ended with exit code 1 and starts again in 0.5 s." in clock.told)

    other.exit_code = -9
    clock.until(lambda: other.starts == 1)

    assert slow_to_start.starts == slow_to_answer.starts == 0


def test_a_part_that_is_alive_and_hangs_is_told_killed_and_started_again(clock: Clock):
    part = clock.add("api")
    clock.answers["api"] = lambda: Answer.SILENT

    clock.until(lambda: part.starts == 1)
    clock.answers["api"] = lambda: Answer.READY
    clock.until(lambda: "api is ready again." in clock.told)

    assert clock.told[0].startswith("api has not answered for 3")
    assert clock.told[1:3] == [
        "api ended with exit code -9 and starts again in 0.5 s.",
        "api is ready again.",
    ]


@pytest.mark.parametrize("answer", [Answer.ALIVE, None])
def test_a_part_that_is_not_ready_or_cannot_be_asked_is_left_alone(
    clock: Clock, answer: Answer | None
):
    part, asked = clock.add("worker"), []

    def ask() -> Answer | None:
        asked.append(True)
        return answer

    clock.answers["worker"] = ask
    clock.until(lambda: len(asked) > 12)

    assert (part.starts, clock.told) == (0, [])


def test_a_check_that_fails_blames_nobody(clock: Clock):
    part, asked = clock.add("flower"), []

    def ask() -> Answer | None:
        asked.append(True)
        raise RuntimeError

    clock.answers["flower"] = ask
    clock.until(lambda: len(asked) > 12)

    assert (part.starts, clock.told) == (0, [])


def test_a_part_that_does_not_die_is_not_started_a_second_time(clock: Clock):
    part = clock.add("worker")
    part.dies = False
    clock.answers["worker"] = lambda: Answer.SILENT
    clock.until(lambda: bool(clock.told))

    for _ in range(int(2 * MAX_BACKOFF_S)):
        clock.look()

    assert part.starts == 0
    part.exit_code = -9
    clock.until(lambda: part.starts == 1)
