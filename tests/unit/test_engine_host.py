"""When an engine process is taken for stuck."""

from __future__ import annotations

from pathlib import Path

from app.engines.base import Sequence
from app.worker.engine.host import (
    LEARNED_AFTER,
    LOAD_FLOOR_NS,
    STEP_FLOOR_NS,
    EngineHost,
    load_limit_ns,
    step_limit_ns,
)
from app.worker.engine.page import PAGE_BYTES, PROGRESS
from app.worker.engine.wire import EngineFacts, LoadModels, Ready, ServedModel
from tests.conftest import STUB_MODELS

S = 1_000_000_000


def test_the_first_steps_may_take_the_whole_timeout() -> None:
    assert step_limit_ns(LEARNED_AFTER - 1, S // 100, 60 * S) == 60 * S


def test_later_ones_many_times_the_slowest_within_a_floor_and_the_timeout() -> None:
    assert step_limit_ns(LEARNED_AFTER, S // 100, 60 * S) == STEP_FLOOR_NS
    assert step_limit_ns(LEARNED_AFTER, S, 60 * S) == 20 * S
    assert step_limit_ns(LEARNED_AFTER, 9 * S, 60 * S) == 60 * S
    assert step_limit_ns(LEARNED_AFTER, S // 100, 3 * S) == 3 * S


def test_a_second_load_may_not_take_as_long_as_a_first() -> None:
    assert load_limit_ns(0, 600 * S) == 600 * S
    assert load_limit_ns(S, 600 * S) == LOAD_FLOOR_NS
    assert load_limit_ns(100 * S, 600 * S) == 600 * S


class Host(EngineHost):
    """A host without a process, under a clock that the test turns."""

    def __init__(self) -> None:
        self.now_s = 0.0
        model = ServedModel("stub", Path("stub"), STUB_MODELS["stub"], "")
        super().__init__(
            LoadModels((model,), "cpu", 1),
            load_timeout_s=600,
            step_timeout_s=60,
            now_ns=lambda: int(self.now_s * 1e9),
        )
        self.start()
        self._take(Ready({"stub": EngineFacts(8, True)}, load_ns=S))
        self.admit("stub", "batch", [Sequence(1, (1,))])

    def _spawn(self) -> None:
        self._progress = bytearray(PAGE_BYTES)  # type: ignore[assignment]

    def step(self, number: int, slowest_ns: int = S // 100) -> None:
        assert self._progress is not None
        PROGRESS.pack_into(self._progress, 0, number, slowest_ns)

    def look_for(self, seconds: float) -> bool:
        """Look once a second, as the runner does."""
        stuck = False
        for _ in range(int(seconds)):
            self.now_s += 1
            stuck = stuck or self.is_stuck()
        return stuck


def test_an_engine_that_was_quick_is_stuck_after_the_floor_and_slow_before() -> None:
    host = Host()
    host.step(LEARNED_AFTER)
    host.is_stuck()

    assert not host.look_for(5)
    assert not host.is_slow
    assert not host.look_for(4)
    assert host.is_slow
    assert host.look_for(2)


def test_progress_begins_the_count_anew() -> None:
    host = Host()
    for number in range(LEARNED_AFTER, LEARNED_AFTER + 5):
        host.step(number)
        assert not host.look_for(9)


def test_time_in_which_the_worker_itself_stood_still_does_not_count() -> None:
    host = Host()
    host.step(LEARNED_AFTER)
    host.is_stuck()

    host.now_s += 3_600  # both were frozen, and the worker looks first

    assert not host.is_stuck()
    assert not host.look_for(6)
