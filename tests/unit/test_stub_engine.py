"""The stub behaves as an engine does, and misbehaves on request."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from app.config.settings import ModelSettings
from app.engines.base import Engine, Generation, Progress, Sequence
from app.engines.registry import create
from app.engines.stub import CRASHED, EMBEDDING_SIZE
from app.errors import OutOfMemory
from app.jobs import FinishReason, Kind, SamplingParams


def stub(progress: Progress = lambda: None, **options: Any) -> Engine:
    settings = ModelSettings(source="stub", kind=Kind.GENERATE, engine="stub", options=options)
    return create("stub", Path(), settings, device="cpu", threads=1, progress=progress)


def sequence(id_: int, prompt: str, **params: Any) -> Sequence:
    return Sequence(id_, tuple(prompt.encode()), SamplingParams(**{"max_tokens": 100} | params))


def run(engine: Engine) -> dict[int, Generation]:
    answers = {}
    while engine.has_work:
        answers |= {each.sequence_id: each for each in engine.step()}
    return answers


def test_each_prompt_comes_back_as_its_own_answer() -> None:
    engine = stub()

    engine.admit("batch", [sequence(1, "wheel"), sequence(2, "stone", max_tokens=3)])
    answers = run(engine)

    assert (answers[1].text, answers[1].finish_reason) == ("wheel", FinishReason.STOP)
    assert (answers[2].text, answers[2].finish_reason) == ("sto", FinishReason.LENGTH)
    assert answers[1].input_tokens == 5
    assert answers[1].started_ns <= answers[1].first_token_ns <= answers[1].finished_ns


def test_shares_of_device_time_sum_to_the_time_of_the_batch() -> None:
    engine = stub()

    engine.admit("batch", [sequence(1, "a"), sequence(2, "a longer one")])
    answers = run(engine)

    [stats] = engine.take_stats()
    assert stats.device_ns == sum(answer.device_ns for answer in answers.values()) > 0
    assert (stats.rows, stats.useful_tokens) == (2, 13 + 2 + 13)
    told = [answer.breakdown.prefill_ns for answer in answers.values() if answer.breakdown]
    assert 0 < told[0] < answers[1].device_ns and 0 < told[1] < answers[2].device_ns
    assert engine.take_stats() == []


def test_an_embedding_depends_on_its_text_alone() -> None:
    engine = stub()

    engine.admit("batch", [Sequence(1, (1, 2)), Sequence(2, (3,)), Sequence(3, (1, 2))])
    answers = run(engine)

    vectors = {id_: answer.embedding for id_, answer in answers.items()}
    assert vectors[1] == vectors[3] != vectors[2]
    assert len(vectors[2] or ()) == EMBEDDING_SIZE


@pytest.mark.parametrize(("kind", "numbers"), [(Kind.CLASSIFY, 2), (Kind.RERANK, 1)])
def test_scores_depend_on_their_text_alone(kind: Kind, numbers: int) -> None:
    settings = ModelSettings(source="stub", kind=kind, engine="stub")
    engine = create("stub", Path(), settings, device="cpu", threads=1, progress=lambda: None)

    engine.admit("batch", [Sequence(1, (1, 2)), Sequence(2, (3,)), Sequence(3, (1, 2))])
    scores = {id_: answer.scores for id_, answer in run(engine).items()}

    assert scores[1] == scores[3] != scores[2]
    assert len(scores[2] or ()) == numbers


def test_a_static_stub_takes_nothing_while_a_batch_is_inside() -> None:
    engine = stub()
    engine.admit("batch", [sequence(1, "a")])

    assert engine.free_rows == 0
    run(engine)
    assert engine.free_rows == 16


def test_a_joining_stub_takes_rows_between_steps() -> None:
    engine = stub(joins=True)
    engine.admit("first", [sequence(1, "a long prompt to echo")])
    engine.step()

    assert engine.free_rows == 15
    engine.admit("second", [sequence(2, "b")])
    assert set(run(engine)) == {1, 2}


def test_a_cancelled_sequence_comes_back_with_what_it_has() -> None:
    engine = stub()
    engine.admit("batch", [sequence(1, "abcdef"), sequence(2, "xyz")])
    engine.step()

    threading.Thread(target=engine.cancel, args=[1]).start()
    answers = run(engine)

    assert answers[1].finish_reason is FinishReason.CANCELLED
    assert "abcdef".startswith(answers[1].text)
    assert answers[2].text == "xyz"


def test_a_cancel_that_overtakes_its_sequence_still_counts() -> None:
    engine = stub()

    engine.cancel(1)
    engine.admit("batch", [sequence(1, "abc")])

    assert run(engine)[1].finish_reason is FinishReason.CANCELLED


def test_a_row_that_fails_does_not_touch_its_mates() -> None:
    engine = stub()

    engine.admit("batch", [sequence(1, "nan"), sequence(2, "fine")])
    answers = run(engine)

    assert (answers[1].finish_reason, answers[1].error_code) == (FinishReason.ERROR, "not_finite")
    assert answers[2].text == "fine"


def test_out_of_memory_drops_the_whole_batch() -> None:
    engine = stub()

    engine.admit("batch", [sequence(id_, "oom above 2") for id_ in (1, 2, 3)])
    with pytest.raises(OutOfMemory):
        engine.step()
    assert not engine.has_work

    engine.admit("half", [sequence(id_, "oom above 2") for id_ in (1, 2)])
    assert len(run(engine)) == 2


def test_a_sleeper_shows_progress_while_it_sleeps() -> None:
    steps: list[None] = []
    engine = stub(lambda: steps.append(None))

    engine.admit("batch", [sequence(1, "system words\nsleep 20")])
    answer = run(engine)[1]

    assert answer.finished_ns - answer.started_ns >= 20_000_000
    assert len(steps) > len(answer.token_ids)


@pytest.mark.parametrize("prompt", ["crash", "please\ncrash"])
def test_a_crash_ends_the_process(prompt: str) -> None:
    code = (
        "from tests.unit.test_stub_engine import *\n"
        f"engine = stub(); engine.admit('batch', [sequence(1, {prompt!r})]); run(engine)"
    )

    ended = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)

    assert ended.returncode == CRASHED
