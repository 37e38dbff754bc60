"""What can be shown without a CUDA device of steps that are recorded, and of those run ahead.

Steps are launched as on such a device, from staged numbers and over pages, but on the CPU, and what
stands for a recorder runs the same work again on the same memory: rooms, filling, and what the host
does while a step is under way are the real ones.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch

from app.engines.base import Sequence
from app.engines.inflight.attention import Packed
from app.engines.inflight.cache import KVCache, LayerShape
from app.engines.inflight.graphs import Graphs, Work, mixed_room, record_all, rooms
from app.engines.inflight.memory import blocks_within
from app.engines.inflight.staging import Order, Room
from app.errors import ConfigError, OutOfMemory
from app.jobs import FinishReason, SamplingParams
from tests.unit.inflight_tiny import (
    FAMILIES,
    again,
    engine_of,
    greedy,
    reference,
    reference_model,
    run_all,
    run_out,
    segments_of,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_come_and_go_are_answered_as_by_generate(family: str) -> None:
    # given prompts that are cut, contexts that grow beyond one page, and a beginning in common
    engine = engine_of(family, rows=5, ahead=again, prefill_tokens=24)
    prompts = {i: tuple(range(i, 9 * i)) for i in range(2, 9)} | {9: tuple(range(8, 75))}

    # when
    generations = run_all(engine, [greedy(i, prompt, 6 * i) for i, prompt in prompts.items()])

    # then
    for i, prompt in prompts.items():
        assert generations[i].token_ids == reference(family, prompt, 6 * i)


def test_every_step_that_has_room_is_replayed() -> None:
    # given
    replayed: list[int] = []

    def record(work: Work) -> Work:
        logits, _ = work()

        def replay() -> tuple[torch.Tensor, torch.Tensor]:
            replayed.append(len(logits))
            return work()

        return replay

    engine = engine_of("llama", rows=3, ahead=record, prefill_tokens=40)

    # when
    run_all(engine, [greedy(i, range(2, 30 * i), 5) for i in range(1, 4)])

    # then steps with parts of prompts and steps without are; the smallest with room is taken
    assert engine._launcher is not None
    steps = sum(stats.rows for stats in engine.take_stats())
    assert 0 < len(replayed) <= steps
    assert set(replayed) == {1, 2, 3}


def test_a_step_is_launched_before_the_last_ones_tokens_are_read() -> None:
    engine = engine_of("llama", ahead=again)
    engine.admit("b", [greedy(1, [5, 6], 4)])

    lengths = []
    while engine.has_work:
        engine.step()
        lengths.append([len(row.output.token_ids) for row in engine._rows.values()])

    # four steps are launched; the fifth call reads the last one's token and launches none
    assert lengths == [[0], [1], [2], [3], []]


def test_a_row_that_stops_pays_for_the_step_it_is_in_and_frees_its_place_at_once() -> None:
    # given a row that stops by its text, which nobody knows beforehand
    engine = engine_of("llama", rows=1, ahead=again)
    answer = reference("llama", (5, 6, 7), 12)
    params = SamplingParams(12, temperature=0.0, stop=(f"w{answer[3]}",), ignore_eos=True)
    engine.admit("x", [Sequence(1, (5, 6, 7), params)])
    engine.admit("y", [greedy(2, [8, 9], 3)])

    # when it has stopped
    while engine._rows.get(1):
        ended = engine.step()

    # then the next is let in by the next step, with which the first comes back
    assert ended == []
    (generation,) = engine.step()
    assert engine._rows[2].slot == 0
    assert generation.token_ids == answer[: answer.index(answer[3]) + 1]
    assert generation.finish_reason is FinishReason.STOP

    generations = {1: generation} | run_out(engine)
    stats = {each.batch_id: each for each in engine.take_stats()}
    assert stats["x"].device_ns == generations[1].device_ns > 0
    assert stats["y"].device_ns == generations[2].device_ns > 0
    assert stats["x"].rows == len(generation.token_ids) + 1
    assert generations[2].token_ids == reference("llama", (8, 9), 3)


def test_a_row_cancelled_under_way_comes_back_with_what_was_read() -> None:
    engine = engine_of("llama", rows=1, ahead=again)
    engine.admit("b", [greedy(1, [5, 6], 50), greedy(2, [7], 3)])
    for _ in range(4):
        engine.step()

    engine.cancel(1)
    (generation,) = engine.step()

    assert generation.finish_reason is FinishReason.CANCELLED
    assert generation.token_ids == reference("llama", (5, 6), 3)
    assert engine._rows[2].slot == 0


def test_a_row_that_gives_way_under_way_ends_with_the_same_text() -> None:
    # given a cache of 5 pages, and rows that will want 2 pages each
    engine = engine_of("llama", rows=3, ahead=again, cache_tokens=5 * 32)
    prompts = {1: range(20), 2: range(30, 50), 3: range(60, 80)}

    generations = run_all(engine, [greedy(i, prompt, 30) for i, prompt in prompts.items()])

    for i, prompt in prompts.items():
        assert generations[i].token_ids == reference("llama", tuple(prompt), 30)


def test_a_seed_gives_the_same_text_whatever_the_company_asks_for() -> None:
    # given a row alone
    params = SamplingParams(12, temperature=1.0, top_p=0.9, top_k=20, seed=7, ignore_eos=True)
    alone = run_all(engine_of("qwen3", ahead=again), [Sequence(1, (3, 4, 5), params)])[1]

    # when it is among rows with penalties, log probabilities, and others
    company = [
        Sequence(2, (2, 9), SamplingParams(9, temperature=0.7, seed=2, ignore_eos=True)),
        Sequence(3, (3, 9), SamplingParams(9, temperature=0.7, repetition_penalty=1.3, seed=3)),
        Sequence(4, (4, 9), SamplingParams(9, temperature=0.0, logprobs=2, ignore_eos=True)),
        Sequence(5, (5, 9), SamplingParams(9, temperature=0.9, min_p=0.1, seed=5)),
    ]
    engine = engine_of("qwen3", rows=3, ahead=again)
    together = run_all(engine, [*company, Sequence(1, (3, 4, 5), params)])

    # then
    assert together[1].token_ids == alone.token_ids
    assert [len(each.top) for each in together[4].logprobs or ()] == [2] * 9


class Alternating:
    """Allows even tokens after odd ones and odd ones after even; stands for a compiled grammar."""

    def __init__(self, last: int) -> None:
        self.last = last

    def fill(self, mask: np.ndarray) -> None:
        allowed = np.arange(32 * len(mask)) % 2 != self.last % 2
        mask[:] = np.packbits(allowed, bitorder="little").view(np.int32)

    def take(self, token_id: int) -> bool:
        assert token_id % 2 != self.last % 2, "drawn from the mask of another token"
        self.last = token_id
        return False


def test_what_a_grammar_allows_follows_from_the_token_before() -> None:
    # given a row whose matcher raises if its mask was not that of its last token
    engine = engine_of("llama", ahead=again)
    params = SamplingParams(12, temperature=1.0, seed=4, ignore_eos=True)
    engine.admit("b", [Sequence(1, (3, 4), params), greedy(2, [5], 12)])
    matcher: Any = Alternating(last=4)
    engine._rows[1].output.matcher = matcher

    # when
    generations = run_out(engine)

    # then
    parities = [token % 2 for token in generations[1].token_ids]
    assert parities == [1, 0] * 6
    assert generations[2].token_ids == reference("llama", (5,), 12)


def test_device_time_adds_up_to_the_nanosecond() -> None:
    engine = engine_of("llama", rows=3, ahead=again)
    engine.admit("x", [greedy(i, [i] * 40, 5 + i) for i in range(1, 4)])
    engine.admit("y", [greedy(i, [i] * 9, 3) for i in range(4, 7)])
    generations = run_out(engine)

    stats = {each.batch_id: each for each in engine.take_stats()}

    for batch, ids in {"x": (1, 2, 3), "y": (4, 5, 6)}.items():
        assert stats[batch].device_ns == sum(generations[i].device_ns for i in ids) > 0


def test_a_step_that_does_not_fit_drops_the_one_under_way_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of("llama", ahead=again)
    engine.admit("b", [greedy(1, [5, 6], 9)])
    engine.step()
    engine.admit("b", [greedy(2, [7, 8], 9)])

    def refuse(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(engine._launcher, "_work", refuse)
        patch.setattr(engine._launcher, "graphs", Graphs({}))
        with pytest.raises(OutOfMemory):
            engine.step()

    assert not engine.has_work
    assert run_all(engine, [greedy(3, (5, 6), 4)])[3].token_ids == reference("llama", (5, 6), 4)


def test_graphs_are_recorded_largest_first_and_left_out_if_one_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # given
    wanted = rooms(num_rows=40, max_tokens=200, queries=16)
    order: list[int] = []

    def record(room: Room) -> Any:
        order.append(room.tokens)
        if room.tokens <= 2:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return lambda: None

    # when
    with caplog.at_level(logging.WARNING):
        recorded = record_all(wanted, record)

    # then
    assert order == sorted(order, reverse=True)
    assert recorded == {}
    assert "operation not permitted when stream is capturing" in caplog.text


def test_tokens_that_are_all_known_can_be_read_at_once() -> None:
    # given
    engine = engine_of("llama", rows=2, ahead=again)
    prompt = tuple(range(3, 70))
    engine._scheduler.tables[0] = np.arange(engine._scheduler.tables.shape[1])
    packed = Packed(
        token_ids=np.array(prompt),
        positions=np.arange(67),
        slots=np.arange(67),
        segments=np.array([[0, 0, 67, 0]], np.int32),
        ends=np.arange(40, 67),
    )

    # when
    with torch.inference_mode():
        logits = engine._logits(packed)
        expected = reference_model("llama")(torch.tensor([prompt])).logits[0, 40:]

    # then
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_pages_are_copied_as_they_were_before_any_was_written() -> None:
    for shapes in ([LayerShape(2, 8)] * 2, [LayerShape(2, 8), LayerShape(1, 8)]):
        cache = KVCache(shapes, 4, torch.float32, torch.device("cpu"), paged=True)
        for number, part in enumerate((*cache.keys, *cache.values)):
            part.copy_(torch.arange(5)[:, None, None, None] + 10.0 * number)

        cache.copy([(0, 1), (1, 2)])

        for number, part in enumerate((*cache.keys, *cache.values)):
            assert part[:, 0, 0, 0].sub(10 * number).tolist() == [0, 0, 1, 3, 4]


@pytest.mark.parametrize(
    ("parts", "room"),
    [
        ([(9, 1)], 1),
        ([(9, 1)] * 3, 4),
        ([(9, 1)] * 33, 40),
        ([(9, 1), (0, 6)], 16),
        ([(9, 1)] * 20 + [(4, 100)], 128),
        ([(9, 1), (0, 239)], 240),
        ([(9, 1), (0, 240)], None),
    ],
)
def test_a_step_takes_the_smallest_graph_that_holds_it(
    parts: list[tuple[int, int]], room: int | None
) -> None:
    graphs = Graphs(dict.fromkeys(rooms(num_rows=40, max_tokens=200, queries=16), Any))  # type: ignore[misc]

    found = graphs.fits(Order.of(segments_of(parts), queries=16))

    assert (found.tokens if found else None) == room


def test_there_is_a_tile_for_every_part_of_a_prompt_that_a_graph_may_meet() -> None:
    worst = [(0, 17)] * 3 + [(0, 2)] * 6  # each ends in a tile that is not full
    order = Order.of(segments_of(worst), queries=16)
    room = mixed_room(order.num_tokens, num_rows=9, queries=16)
    assert order.num_tiles <= room.tiles


def test_the_cache_leaves_room_for_the_largest_step_twice() -> None:
    gib = 2**30
    blocks = blocks_within(free=70 * gib, peak=2 * gib, share=0.9, block_bytes=2**20)
    assert blocks == int((70 - 4 - 0.25) * 1024 * 0.9)

    with pytest.raises(ConfigError, match="no room for a KV cache"):
        blocks_within(free=4 * gib, peak=2 * gib, share=0.9, block_bytes=2**20)
