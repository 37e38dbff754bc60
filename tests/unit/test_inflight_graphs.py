"""What can be shown of the recorded decode steps without a CUDA device.

The recorder is replaced by one that runs the same work again, on the same buffers: shapes, buckets,
padding and the refilling of inputs are the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from app.engines.inflight import attention
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


class Blindfold(TorchDispatchMode):
    """Refuses what a CUDA device would have to finish its work for, or an upload while recording:
    values read on the host, sizes that depend on values, tensors made of Python numbers."""

    _LOOKS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh"})

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        masks = name.startswith("index") and any(
            isinstance(each, torch.Tensor) and each.dtype is torch.bool
            for arg in args[1:]
            if isinstance(arg, list | tuple)
            for each in arg
        )
        if name in self._LOOKS or masks:
            raise AssertionError(f"{func} looks at values")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recorded_step_looks_at_no_value(family: str) -> None:
    def record(work: Replay) -> Replay:
        with Blindfold():
            work()
        return work

    engine = engine_of(family, portable=True)
    engine._graphs = graphs = DecodeGraphs(engine._model, engine._cache, record)
    run_all(engine, [greedy(i, range(2, 6 + i), 3) for i in range(3)])

    assert graphs._graphs


@pytest.mark.parametrize(
    "look", [lambda x: x.item(), lambda x: x[x > 0], lambda x: x * torch.tensor(2.0), torch.nonzero]
)
def test_a_look_at_a_value_is_seen(look: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(AssertionError, match="looks at values"), Blindfold():
        look(torch.ones(1))


def test_long_prompts_are_attended_to_in_bounded_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    # given
    monkeypatch.setattr(attention, "_SCORES", 200)
    engine = engine_of("qwen2", portable=True)
    prompts = {0: range(2, 90), 1: range(3, 91), 2: range(4, 40)}

    # when
    generations = run_all(engine, [greedy(i, prompt, 6) for i, prompt in prompts.items()])
    cut = list(attention._bounded(np.array([[0, 0, 70, 5], [1, 70, 70, 40]])))

    # then
    assert all(part[0, 2] * len(part) * 128 <= 200 for part in cut)
    assert sorted(first for part in cut for _, first, _, _ in part.tolist()) == list(range(140))
    for i, prompt in prompts.items():
        assert generations[i].token_ids == reference("qwen2", tuple(prompt), 6)


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
