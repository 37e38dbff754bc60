"""What the compiled attention computes is attention, for any shape, and however a prompt is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.engines.inflight import native
from app.engines.inflight.attention import Packed
from app.engines.inflight.cache import BLOCK, KVCache, LayerShape, blocks_for
from app.engines.inflight.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C++ compiler")

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    lengths: list[int]  #: of the sequences
    kv_heads: int
    group: int
    dim: int
    window: int = 0
    softcap: float = 0.0
    has_sinks: bool = False

    @property
    def sinks(self) -> Tensor | None:
        """Of all heads: from next to nothing to most of the attention."""
        return torch.linspace(-4, 9, self.kv_heads * self.group) if self.has_sinks else None

    @property
    def how(self) -> dict[str, Any]:
        return {
            "scale": 0.3,
            "window": self.window,
            "softcap": self.softcap,
            "sinks": self.sinks,
        }


cases = st.builds(
    Case,
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    dim=st.sampled_from([16, 32, 64, 80, 128]),
    window=st.sampled_from([0, 0, 1, 20, 150]),
    softcap=st.sampled_from([0.0, 0.0, 2.0]),
    has_sinks=st.booleans(),
)
dtypes = st.sampled_from([torch.bfloat16, torch.float32])


@given(case=cases, dtype=dtypes, cuts=st.lists(st.integers(1, 90), min_size=1, max_size=6))
@example(Case([513], 1, 3, 64), torch.bfloat16, [1, 256])
@example(Case([33, 1], 2, 1, 16), torch.bfloat16, [33])
@settings(deadline=None, max_examples=60)
def test_attention_is_right_for_any_shape_and_the_same_however_prompts_are_cut(
    case: Case, dtype: torch.dtype, cuts: list[int]
) -> None:
    # given
    generator = torch.Generator().manual_seed(sum(case.lengths))
    heads = (case.kv_heads * case.group, case.kv_heads, case.kv_heads)
    inputs = [
        [torch.randn(count, n, case.dim, generator=generator).to(dtype) for count in heads]
        for n in case.lengths
    ]

    # when all is computed at once, and in chunks
    at_once = _attend(case, inputs, [max(case.lengths)])
    in_chunks = _attend(case, inputs, cuts)

    # then
    tolerance = 2**-6 if dtype is torch.bfloat16 else 1e-4
    for mine, chunked, (query, key, value) in zip(at_once, in_chunks, inputs, strict=True):
        assert torch.equal(mine, chunked)
        wanted = _reference(case, query.float(), key.float(), value.float())
        torch.testing.assert_close(mine.float(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_number_that_is_none_spoils_its_own_sequence_alone(dtype: torch.dtype) -> None:
    # given three sequences, one of whose tokens is NaN
    case = Case([40, 40, 40], 2, 2, 32)
    inputs = [[torch.ones(count, 40, 32).to(dtype) for count in (4, 2, 2)] for _ in range(3)]
    inputs[1][1][:, 35] = float("nan")

    # when
    out = _attend(case, inputs, [40])

    # then
    assert torch.isfinite(out[0]).all()
    assert torch.isfinite(out[2]).all()
    assert torch.isfinite(out[1][:35]).all()
    assert torch.isnan(out[1][35:]).all()


def _attend(case: Case, inputs: list[list[Tensor]], cuts: list[int]) -> list[Tensor]:
    """[tokens, heads, dim] of each sequence; steps compute the next so many tokens of each."""
    width = blocks_for(max(case.lengths))
    tables = np.random.default_rng(0).permutation(width * len(inputs)).astype(np.int32)
    tables = tables.reshape(len(inputs), width)
    cache = KVCache([LayerShape(case.kv_heads, case.dim)], tables.size, inputs[0][0].dtype, CPU)
    for part in (*cache.keys, *cache.values):
        part.fill_(float("nan"))  # nobody may look at what was not written
    kernel = native.load(cache)
    assert kernel is not None
    outs: list[list[Tensor]] = [[] for _ in inputs]
    done, turn = 0, 0
    while done < max(case.lengths):
        size = cuts[turn % len(cuts)]
        spans = [(done, min(done + size, n)) for n in case.lengths]
        rows = [row for row, (start, end) in enumerate(spans) if start < end]
        packed = _packed([(row, *spans[row]) for row in rows], tables)
        query, key, value = (
            torch.cat([inputs[row][part][:, slice(*spans[row])] for row in rows], 1)
            for part in range(3)
        )
        out = native.NativeStep(kernel, packed, tables).attend(0, query, key, value, **case.how)
        counts = [spans[row][1] - spans[row][0] for row in rows]
        for row, part in zip(rows, torch.split(out, counts), strict=True):
            outs[row].append(part)
        done, turn = done + size, turn + 1
    return [torch.cat(each) for each in outs]


def _packed(spans: list[tuple[int, int, int]], tables: np.ndarray) -> Packed:
    positions = np.concatenate([np.arange(start, end) for _, start, end in spans])
    rows = np.concatenate([np.full(end - start, row) for row, start, end in spans])
    counts = np.array([end - start for _, start, end in spans])
    firsts = np.cumsum(counts) - counts
    segments = [
        (row, first, end - start, start)
        for (row, start, end), first in zip(spans, firsts.tolist(), strict=True)
    ]
    slots = tables[rows, positions // BLOCK].astype(np.int64) * BLOCK + positions % BLOCK
    return Packed(positions, positions, slots, np.array(segments, np.int32), firsts)


def _reference(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """In float32, all places at once."""
    key, value = (part.repeat_interleave(case.group, 0) for part in (key, value))
    scores = query @ key.transpose(1, 2) * case.how["scale"]
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    places = torch.arange(scores.shape[-1])
    hidden = places > places[:, None]
    if case.window:
        hidden |= places <= places[:, None] - case.window
    scores = scores.masked_fill(hidden, float("-inf"))
    if case.sinks is not None:
        column = case.sinks[:, None, None].expand(-1, len(places), 1)
        scores = torch.cat([scores, column], -1)
    return (scores.softmax(-1)[..., : len(places)] @ value).transpose(0, 1)
