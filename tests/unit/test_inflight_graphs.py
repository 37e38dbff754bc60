"""What can be shown of the recorded decode steps without a CUDA device.

The recorder is replaced by one that runs the same work again, on the same buffers: shapes, buckets,
padding and the refilling of inputs are the real ones.
"""

from __future__ import annotations

import pytest

from app.engines.inflight.graphs import DecodeGraphs, Replay, row_bucket, width_bucket
from tests.unit.inflight_tiny import FAMILIES, engine_of, greedy, reference, run_all


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_fill_up_a_bucket_change_no_text(family: str) -> None:
    # given
    recorded: list[Replay] = []

    def record(work: Replay) -> Replay:
        recorded.append(work)
        return work

    engine = engine_of(family, rows=5, portable=True)
    engine._graphs = graphs = DecodeGraphs(engine._model, engine._cache, record)

    # when rows come and go, and contexts grow beyond one block
    prompts = {i: tuple(range(i, 9 * i)) for i in range(2, 9)}
    generations = run_all(engine, [greedy(i, prompt, 6 * i) for i, prompt in prompts.items()])

    # then
    for i, prompt in prompts.items():
        assert generations[i].token_ids == reference(family, prompt, 6 * i)
    assert len(recorded) == len(graphs._graphs)
    assert {rows for rows, _ in graphs._graphs} >= {1, 2, 4, 8}


def test_a_step_with_a_part_of_a_prompt_is_not_replayed() -> None:
    engine = engine_of("llama", portable=True, prefill_tokens=8)
    engine._graphs = graphs = DecodeGraphs(engine._model, engine._cache, lambda work: work)
    engine.admit("b", [greedy(1, range(20), 3)])

    for expected in (0, 0, 0, 1):
        engine.step()
        assert len(graphs._graphs) == expected


@pytest.mark.parametrize(
    ("rows", "bucket"), [(1, 1), (2, 2), (3, 4), (9, 16), (33, 48), (49, 64), (64, 64), (65, 96)]
)
def test_rows_go_into_the_next_bucket(rows: int, bucket: int) -> None:
    assert row_bucket(rows) == bucket


@pytest.mark.parametrize(("width", "bucket"), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 12), (12, 12)])
def test_widths_are_powers_of_two_within_the_table(width: int, bucket: int) -> None:
    assert width_bucket(width, 12) == bucket
