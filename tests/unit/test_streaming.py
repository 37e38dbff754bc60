"""Tokens leave an engine as they come, and their texts add up to the answer's."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.engines.base import Engine, Generation, NewTokens, Sequence
from app.engines.inflight.engine import InflightEngine
from app.engines.text.stopping import Output
from app.jobs import FinishReason, Grammar, SamplingParams
from tests.unit import tiny_models
from tests.unit.test_stopping import BYTES, EOS
from tests.unit.tiny_models import load

WORDS = Grammar("regex", "(é|漢|🙂|the|mill| ){40}")


def pieces_of(output: Output, token_ids: list[int]) -> tuple[list[str], FinishReason | None]:
    pieces = []
    for token in token_ids:
        reason = output.append(token)
        pieces.append(output.take_text())
        if reason:
            return [*pieces, output.take_rest()], reason
    return [*pieces, output.take_rest()], None


@given(
    st.one_of(st.text(max_size=40).map(str.encode), st.binary(max_size=40)),
    st.lists(st.text(min_size=1, max_size=4), max_size=3),
    st.integers(1, 50),
)
@example(b"\x80?", ["?"], 2)  # the stop string makes the broken character before it certain
def test_the_pieces_add_up_to_the_text(data: bytes, stop: list[str], max_tokens: int) -> None:
    params = SamplingParams(max_tokens, stop=tuple(stop))
    output, plain = Output(params, BYTES, (), stream=True), Output(params, BYTES, ())

    pieces, reason = pieces_of(output, [*data, EOS])

    assert next((r for token in [*data, EOS] if (r := plain.append(token))), None) is reason
    assert "".join(pieces) == output.text == plain.text
    assert output.token_ids == plain.token_ids


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1))
def test_no_more_is_held_back_than_may_begin_a_stop_string(text: str, stop: list[str]) -> None:
    output = Output(SamplingParams(100, stop=tuple(stop)), BYTES, (), stream=True)

    for place, token in enumerate(text.encode(), start=1):
        if output.append(token):
            break
        output.take_text()
        held = text[output._taken : place]
        assert held == "" or any(each.startswith(held) for each in stop)
        if output._taken:
            assert not any(each.startswith(text[output._taken - 1 : place]) for each in stop)


def test_a_character_comes_when_its_last_token_does() -> None:
    output = Output(SamplingParams(100), BYTES, (), stream=True)

    pieces, _ = pieces_of(output, [*"a🙂é".encode(), EOS])

    assert pieces == ["a", "", "", "", "🙂", "", "é", "", ""]


# ── engines ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_llama(tmp_path_factory.mktemp("streaming") / "model")


def run(
    engine: Engine, *sequences: Sequence
) -> tuple[dict[int, Generation], list[list[NewTokens]]]:
    """The generations, and what came new with each step."""
    engine.admit("batch", sequences)
    generations, steps = {}, []
    while engine.has_work:
        generations.update({each.sequence_id: each for each in engine.step()})
        steps.append(engine.take_tokens())
    return generations, steps


def sequence(id_: int, prompt: str = "the mill", stream: bool = True, **params: object) -> Sequence:
    given = {"max_tokens": 60, "seed": id_, "grammar": WORDS} | params
    return Sequence(id_, tuple(prompt.encode()), SamplingParams(**given), stream=stream)  # type: ignore[arg-type]


def told_of(id_: int, steps: list[list[NewTokens]]) -> tuple[list[int], str]:
    new = [each for step in steps for each in step if each.sequence_id == id_]
    return [token for each in new for token in each.token_ids], "".join(each.text for each in new)


@pytest.mark.parametrize("name", ["inflight", "generate", "stub"])
def test_tokens_and_texts_add_up_to_the_answer(folder: Path, name: str) -> None:
    engine = load(folder, name)
    wanted = [
        sequence(1, "water wheel 漢字"),
        sequence(2, "a mill", stop=("mi", "🙂", "ee")),
        sequence(3, "mill stones", stop=("ll s", "l 漢")),
        sequence(4, max_tokens=7),
        sequence(5, "né🙂", grammar=None),
        sequence(6, stream=False),
    ]

    generations, steps = run(engine, *wanted)

    for each in wanted[:-1]:
        answer = generations[each.id]
        assert told_of(each.id, steps) == (answer.token_ids, answer.text)
    assert told_of(6, steps) == ([], "")
    assert engine.take_tokens() == []


@pytest.mark.parametrize("name", ["inflight", "stub"])
def test_each_step_brings_a_token_of_each_row(folder: Path, name: str) -> None:
    _, steps = run(load(folder, name), *(sequence(i, max_tokens=5) for i in (1, 2)))

    assert len(steps) >= 5
    for step in steps[-5:]:
        assert sorted(each.sequence_id for each in step if each.token_ids) == [1, 2]


def test_a_cancelled_row_has_streamed_what_it_keeps(folder: Path) -> None:
    engine = load(folder, "inflight")
    engine.admit("b", [sequence(1, grammar=None, stop=("\n\n",))])
    steps = []
    for _ in range(9):
        assert engine.step() == []
        steps.append(engine.take_tokens())

    engine.cancel(1)
    [answer] = engine.step()
    steps.append(engine.take_tokens())

    assert answer.finish_reason is FinishReason.CANCELLED
    assert told_of(1, steps) == (answer.token_ids, answer.text)


def test_a_row_that_loses_its_place_streams_each_token_once(folder: Path) -> None:
    # given a cache that does not hold all that these rows will want
    engine = load(folder, "inflight", rows=3, cache_tokens=3 * 32)
    assert isinstance(engine, InflightEngine)
    lost: list[int] = []
    preempt = engine._scheduler._preempt

    def spy() -> object:
        row = preempt()
        lost.append(row.sequence.id)
        return row

    engine._scheduler._preempt = spy  # type: ignore[method-assign, assignment]
    wanted = [sequence(i, f"{i} mills", stop=("🙂🙂",)) for i in range(3)]

    # when
    generations, steps = run(engine, *wanted)

    # then
    assert lost
    for each in wanted:
        answer = generations[each.id]
        assert told_of(each.id, steps) == (answer.token_ids, answer.text)
