"""A real engine process: it may be stopped, stuck or orphaned, and harms nobody by it."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from app.config.settings import ModelSettings
from app.engines.base import Generation, NewTokens, Sequence, StepStats
from app.engines.spec import STUB
from app.errors import EngineError, OutOfMemory
from app.jobs import FinishReason, SamplingParams
from app.worker.engine import host as host_module
from app.worker.engine.ends import Ends
from app.worker.engine.host import LAUNCH, EngineHost
from app.worker.engine.page import PAGE_BYTES, PROGRESS
from app.worker.engine.process import EngineProcess
from app.worker.engine.wire import (
    Admit,
    Broken,
    Cancel,
    Event,
    LoadModels,
    Ready,
    Recalled,
    ServedModel,
    Stepped,
)
from tests.waiting import eventually

ROWS = 64


def engine_host(**options: object) -> EngineHost:
    settings = ModelSettings(
        source="stub", kind="generate", engine="stub", max_batch_size=ROWS, options=options
    )
    load = LoadModels((ServedModel("stub", Path(), settings, STUB.factory),), "cpu", 1)
    return EngineHost(load, load_timeout_s=60, step_timeout_s=60)


@pytest.fixture
def host() -> Iterator[EngineHost]:
    host = engine_host()
    host.start()
    yield host
    host.kill()


def heard(host: EngineHost, kind: type[Event], timeout_s: float = 30) -> list[Event]:
    """All events up to the first of a kind."""
    events: list[Event] = []

    def has_come() -> bool:
        host.flush()
        events.extend(host.events())
        return any(isinstance(event, kind) for event in events)

    eventually(has_come, timeout_s)
    return events


def prompts_of(num_bytes: int) -> list[Sequence]:
    return [
        Sequence(n, (65,) * num_bytes, SamplingParams(max_tokens=1)) for n in range(1, ROWS + 1)
    ]


def test_a_model_that_cannot_be_loaded_is_named_in_a_sentence_and_not_tried_again(
    tmp_path: Path,
) -> None:
    # given a second model behind one that loads, with a folder of nothing
    settings = ModelSettings(source="stub", kind="generate", engine="stub")
    served = (
        ServedModel("good", Path(), settings, STUB.factory),
        ServedModel("bad", tmp_path, settings, "app.engines.generate.engine:GenerateEngine"),
    )
    host = EngineHost(LoadModels(served, "cpu", 1), load_timeout_s=60, step_timeout_s=60)

    host.start()
    broken = heard(host, Broken, 60)[-1]
    host.kill()

    assert isinstance(broken, Broken)
    assert broken.will_not_load
    assert broken.reason.startswith(f"Model bad: {tmp_path}")
    assert "Traceback" not in broken.reason and broken.reason.endswith(".")


def test_whoever_sends_to_a_stopped_engine_process_does_not_wait_for_it(host: EngineHost) -> None:
    # given an engine process that is stopped
    heard(host, Ready)
    assert host.pid is not None
    os.kill(host.pid, signal.SIGSTOP)

    # when it is sent far more than its socket holds
    began_s = time.monotonic()
    host.admit("stub", "batch", prompts_of(8_192))
    host.cancel("stub", 1)

    # then that returns at once, and all of it arrives when the process goes on
    assert time.monotonic() - began_s < 5
    assert host.connection is not None
    assert host.connection.wants_write
    os.kill(host.pid, signal.SIGCONT)
    answered: set[int] = set()
    while len(answered) < ROWS:
        for event in heard(host, Stepped):
            assert isinstance(event, Stepped)
            answered |= {generation.sequence_id for generation in event.generations}
    assert not host.busy


def test_half_a_message_of_a_stopped_engine_process_is_not_waited_for(host: EngineHost) -> None:
    heard(host, Ready)
    assert host.pid is not None
    process = psutil.Process(host.pid)
    host.admit("stub", "batch", prompts_of(8_192))  # its answers are long, too

    # stopped while it answers, if not at the first try then soon
    for _ in range(200):
        process.suspend()
        began_s = time.monotonic()
        events = host.events()
        assert time.monotonic() - began_s < 5
        process.resume()
        if any(isinstance(event, Stepped) for event in events):
            break
        time.sleep(0.002)


PARENT = """
import os, sys, threading, time
from tests.unit.test_engine_process import engine_host

host = engine_host(load_ms=600_000)

def keep() -> None:
    host.start()
    print(host.pid, flush=True)
    time.sleep(600)

threading.Thread(target=keep, daemon=True).start()
time.sleep(600)
"""


@pytest.mark.parametrize("is_held_up", [False, True])
def test_an_engine_process_that_still_loads_does_not_outlive_its_worker(is_held_up: bool) -> None:
    # given a worker with an engine process that loads, or cannot do a thing while it does
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        engine = psutil.Process(int(parent.stdout.readline()))
        eventually(lambda: str(LAUNCH) in engine.cmdline())
        eventually(lambda: _is_mapped(engine))
        if is_held_up:
            engine.suspend()

        # when the worker dies
        parent.kill()

    # then the engine process is gone at once
    eventually(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, 10)


def _is_mapped(engine: psutil.Process) -> bool:
    """Whether it has got as far as its own code."""
    return any("memfd:gristmill-progress" in each.path for each in engine.memory_maps())


def test_progress_needs_no_room_in_any_file_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    host = engine_host()
    try:
        host.start()
        heard(host, Ready)
    finally:
        host.kill()


def test_without_memory_to_share_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "memfd_create", full, raising=False)
    with pytest.raises(EngineError, match=r"No memory to share .* No space left"):
        engine_host().start()


def test_waiting_for_the_end_of_an_engine_process_asks_no_clock(
    monkeypatch: pytest.MonkeyPatch, host: EngineHost
) -> None:
    # given a clock that jumps, in which no sleep is possible
    def fails(_: float) -> None:
        raise OSError(22, "Invalid argument")

    process = host._process
    assert process is not None
    monkeypatch.setattr(time, "sleep", fails)
    # when
    host.kill()
    # then
    assert process.returncode == -signal.SIGKILL


def test_an_engine_process_that_cannot_be_killed_ends_its_worker(
    monkeypatch: pytest.MonkeyPatch, host: EngineHost
) -> None:
    # a process inside a driver's call does not die: here a signal that it does not heed
    monkeypatch.setattr(host_module, "KILL_S", 0.1)
    assert host._process is not None
    monkeypatch.setattr(host._process, "kill", lambda: None)
    try:
        with pytest.raises(EngineError, match="cannot be ended"):
            host.kill()
    finally:
        monkeypatch.undo()


def prompt(number: int, text: str) -> Sequence:
    return Sequence(number, tuple(text.encode()), SamplingParams(max_tokens=1))


def test_the_next_batch_begins_when_the_one_before_is_over_without_a_word(host: EngineHost) -> None:
    # given a batch that runs, and one that was sent after it
    heard(host, Ready)
    host.admit("stub", "first", [prompt(1, "a\nsleep 300")])
    host.admit("stub", "second", [prompt(2, "b")])
    assert (host.free_rows("stub"), host.has_waiting("stub")) == (0, True)

    # when both are over
    answers: list[Generation] = []
    while len(answers) < 2:
        for event in heard(host, Stepped):
            assert isinstance(event, Stepped)
            answers += event.generations

    # then the second began when the first ended
    first, second = answers
    assert (first.sequence_id, second.sequence_id) == (1, 2)
    assert first.finished_ns <= second.started_ns
    assert (host.busy, host.free_rows("stub")) == (False, ROWS)


def test_what_has_not_begun_comes_back_at_once_whatever_runs(host: EngineHost) -> None:
    heard(host, Ready)
    host.admit("stub", "first", [prompt(1, "a\nsleep 600000")])
    host.admit("stub", "second", [prompt(2, "b"), prompt(3, "c")])
    eventually(lambda: PROGRESS.unpack_from(cast(Any, host)._progress)[0])  # the first has begun

    host.recall("stub")
    recalled = heard(host, Recalled)

    assert recalled == [Recalled("stub", (2, 3))]
    assert (host.busy, host.has_waiting("stub")) == (True, False)
    host.cancel("stub", 1)
    heard(host, Stepped)
    assert not host.busy


class Scarce:
    """An engine that has no memory for its first step, during which more is sent to it."""

    def __init__(self, *, joins: bool) -> None:
        self.joins = joins
        self.waiting: deque[Admit]
        self._sequences: list[Sequence] = []
        self._did_not_fit = False

    def admit(self, batch_id: str, sequences: list[Sequence]) -> None:
        self._sequences += sequences

    def step(self) -> list[Generation]:
        sequences, self._sequences = self._sequences, []
        if not self._did_not_fit:
            self._did_not_fit = True
            self.waiting.append(Admit("m", "late", (Sequence(3, (65,)),)))
            raise OutOfMemory
        return [Generation(each.id, FinishReason.STOP) for each in sequences]

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def take_stats(self) -> list[StepStats]:
        return []


def process_of(engine: Any, *waiting: Admit) -> tuple[EngineProcess, deque[Admit], list[Any]]:
    """An engine process in this one, what waits in it, and what it says."""
    said: list[Any] = []
    parent: Any = SimpleNamespace(send=said.append)
    process = EngineProcess(parent, mmap.mmap(-1, PAGE_BYTES))
    process._waiting["m"] = deque(waiting)
    process._engines["m"] = engine
    process._ends["m"] = Ends(ROWS, joins=engine.joins)
    return process, process._waiting["m"], said


def test_what_is_sent_while_memory_runs_out_is_not_among_what_was_dropped() -> None:
    # given an engine process whose engine will have no memory
    engine: Any = Scarce(joins=True)
    early = Admit("m", "early", (Sequence(1, (65,)), Sequence(2, (65,))))
    process, engine.waiting, said = process_of(engine, early)

    # when it steps twice
    for _ in range(2):
        process._admit()
        process._step("m", engine)

    # then the worker is told of those that were inside, and of the other's answer
    dropped, stepped = said
    assert (dropped.model, dropped.sequence_ids) == ("m", (1, 2))
    assert [each.sequence_id for each in stepped.generations] == [3]


def test_what_waits_for_an_engine_without_memory_comes_back_before_it_is_tried() -> None:
    # given an engine that nobody can join, and that will have no memory
    engine: Any = Scarce(joins=False)
    process, engine.waiting, said = process_of(engine, Admit("m", "early", (Sequence(1, (65,)),)))

    # when it steps
    process._admit()
    process._step("m", engine)

    # then what was sent meanwhile is told of first, and is no part of what was dropped
    recalled, dropped = said
    assert recalled == Recalled("m", (3,))
    assert (dropped.model, dropped.sequence_ids) == ("m", (1,))


class Steady:
    """An engine whose sequences end in the steps that their ids say."""

    joins = True

    def __init__(self) -> None:
        self._left: list[int] = []
        self._num_steps = 0
        self.cancelled: list[int] = []

    def admit(self, batch_id: str, sequences: list[Sequence]) -> None:
        self._left += [each.id for each in sequences]

    def step(self) -> list[Generation]:
        self._num_steps += 1
        ended = [id for id in self._left if id == self._num_steps]
        self._left = [id for id in self._left if id != self._num_steps]
        now_ns = time.monotonic_ns()
        long_ago = now_ns - 3_600_000_000_000  # no two are told within a quarter of a second
        return [
            Generation(id, FinishReason.LENGTH, started_ns=long_ago, finished_ns=now_ns)
            for id in ended
        ]

    def cancel(self, sequence_id: int) -> None:
        self.cancelled.append(sequence_id)

    def take_tokens(self) -> list[NewTokens]:
        return []

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    def take_stats(self) -> list[StepStats]:
        return [StepStats("b", rows=1, useful_tokens=1)]


def stepped(
    process: EngineProcess, engine: Any, said: list[Any], num_steps: int
) -> list[list[int]]:
    """What the process says in each step."""
    told = []
    for _ in range(num_steps):
        process._step("m", engine)
        told.append([each.sequence_id for event in said for each in event.generations])
        said.clear()
    return told


def test_ends_are_told_together_and_the_last_at_once_with_what_their_steps_computed() -> None:
    engine: Any = Steady()
    process, _, said = process_of(engine, Admit("m", "b", tuple(prompts_of(1)[:5])))
    process._admit()

    assert stepped(process, engine, said, 4) == [[1], [], [], []]
    process._step("m", engine)

    [event] = said
    assert [each.sequence_id for each in event.generations] == [2, 3, 4, 5]
    assert [(each.batch_id, each.rows) for each in event.stats] == [("b", 4)]


def test_the_end_of_a_sequence_that_streams_is_told_with_its_last_tokens() -> None:
    engine: Any = Steady()
    sequences = [replace(each, stream=each.id == 3) for each in prompts_of(1)[:5]]
    process, _, said = process_of(engine, Admit("m", "b", tuple(sequences)))
    process._admit()

    assert stepped(process, engine, said, 5) == [[1], [], [2, 3], [], [4, 5]]


def test_ends_do_not_wait_for_a_step_of_another_model_which_may_be_a_whole_batch() -> None:
    # given an end that waits for others
    engine: Any = Steady()
    process, _, said = process_of(engine, Admit("m", "b", tuple(prompts_of(1)[:4])))
    process._admit()
    assert stepped(process, engine, said, 2) == [[1], []]

    # when another model is about to step
    process._ends["slow"] = Ends(ROWS, joins=False)
    slow: Any = Steady()
    told_before: list[int] = []

    def step() -> list[Generation]:
        told_before.extend(each.sequence_id for event in said for each in event.generations)
        return []

    slow.step = step
    process._inside["slow"] = {}
    process._step("slow", slow)

    assert told_before == [2]


def test_what_ended_before_memory_ran_out_is_told_and_not_dropped() -> None:
    engine: Any = Steady()
    process, _, said = process_of(engine, Admit("m", "b", tuple(prompts_of(1)[:4])))
    process._admit()
    stepped(process, engine, said, 2)  # the first is told, and so the second is not yet

    def fails() -> list[Generation]:
        raise OutOfMemory

    engine.step = fails
    process._step("m", engine)

    told, dropped = said
    assert [each.sequence_id for each in told.generations] == [2]
    assert sorted(dropped.sequence_ids) == [3, 4]


def test_an_engine_is_not_told_to_cancel_what_has_ended_for_it_would_wait_for_it_forever() -> None:
    # given sequences of which one has ended, one runs and one is still to come
    engine: Any = Steady()
    process, waiting, said = process_of(engine, Admit("m", "b", tuple(prompts_of(1)[:2])))
    process._admit()
    stepped(process, engine, said, 1)
    waiting.append(Admit("m", "b", tuple(prompts_of(1)[2:3])))

    # when all are cancelled
    cancels = iter([Cancel("m", 1), Cancel("m", 2), Cancel("m", 3)])
    process._parent = cast(Any, SimpleNamespace(recv=lambda: next(cancels)))
    with pytest.raises(StopIteration):
        process._listen()

    assert engine.cancelled == [2, 3]
