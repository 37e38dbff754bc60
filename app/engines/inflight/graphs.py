"""Decode steps as recorded CUDA graphs: one launch instead of thousands.

A graph has fixed shapes, so there is one for each pair of a row bucket and a table width, recorded
when it is first needed. All its inputs lie in one buffer, filled by one transfer from pinned
memory. Rows that only fill up a bucket write into a block of the cache that belongs to nobody.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from app.engines.inflight.attention import Group, Packed, PortableStep, run
from app.engines.inflight.cache import BLOCK, KVCache, blocks_for

Replay = Callable[[], Tensor]
Record = Callable[[Replay], Replay]

_ROW_BUCKETS: Final = (1, 2, 4, 8, 16, 24, 32, 48)  # then multiples of 32
_TOKEN, _POSITION, _BLOCK, _PLACE, _TABLE = range(5)
"""Columns of a graph's input buffer; the table of blocks takes the rest of the row."""


class DecodeGraphs:
    """Graphs of the steps in which every row has one token."""

    def __init__(
        self, model: PreTrainedModel, cache: KVCache, record: Record | None = None
    ) -> None:
        self._model = model
        self._cache = cache
        self._record = record or _CudaRecorder()
        self._graphs: dict[tuple[int, int], _Graph] = {}

    def fits(self, packed: Packed) -> bool:
        return len(packed.segments) == len(packed.token_ids) == len(packed.ends)

    def run(self, packed: Packed, tables: np.ndarray) -> Tensor:
        """Logits [rows, vocab]; valid until the next run."""
        num_rows = len(packed.token_ids)
        width = blocks_for(int(packed.positions.max()) + 1)
        bucket = row_bucket(num_rows), width_bucket(width, tables.shape[1])
        if bucket not in self._graphs:
            self._graphs[bucket] = _Graph(self._model, self._cache, *bucket)
        graph = self._graphs[bucket]
        graph.fill(packed, tables)
        if graph.replay is None:  # the first run, with this step's inputs, does no harm twice
            graph.replay = self._record(graph.work)
        return graph.replay()[:num_rows]


class _Graph:
    """Inputs of one shape, and the pass of the model over them."""

    def __init__(self, model: PreTrainedModel, cache: KVCache, rows: int, width: int) -> None:
        device = cache.keys[0].device
        staging = torch.empty(rows, _TABLE + width, dtype=torch.int64)
        self._staging = staging.pin_memory() if device.type == "cuda" else staging
        self._inputs = self._staging.to(device)
        self._scrap = cache.scrap
        self.replay: Replay | None = None
        columns = self._inputs.unbind(1)
        group = Group(
            tokens=torch.arange(rows, device=device)[:, None],
            tables=self._inputs[:, _TABLE:],
            positions=columns[_POSITION][:, None],
        )
        step = PortableStep(cache, columns[_BLOCK], columns[_PLACE], [group])
        ends = torch.arange(rows, device=device)
        self.work: Replay = lambda: run(model, step, columns[_TOKEN], columns[_POSITION], ends)

    def fill(self, packed: Packed, tables: np.ndarray) -> None:
        rows, width = len(packed.token_ids), self._staging.shape[1] - _TABLE
        staging = self._staging.numpy()
        staging[rows:] = 0
        staging[rows:, _BLOCK] = staging[rows:, _TABLE:] = self._scrap
        staging[:rows, _TOKEN] = packed.token_ids
        staging[:rows, _POSITION] = packed.positions
        staging[:rows, _BLOCK], staging[:rows, _PLACE] = np.divmod(packed.slots, BLOCK)
        staging[:rows, _TABLE:] = tables[packed.segments[:, 0], :width]
        # The step before has been waited for, so nobody reads the pinned memory any more.
        self._inputs.copy_(self._staging, non_blocking=True)


class _CudaRecorder:
    """Records work as a CUDA graph. All graphs share their memory: only one runs at a time.

    All are recorded on one stream, where the first calls of libraries are made as well: what those
    set up belongs to the stream.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, work: Replay) -> Replay:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            out = work()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def row_bucket(num_rows: int) -> int:
    """The smallest bucket that holds so many rows."""
    if num_rows <= _ROW_BUCKETS[-1]:
        return _ROW_BUCKETS[bisect_left(_ROW_BUCKETS, num_rows)]
    return -(-num_rows // 32) * 32


def width_bucket(width: int, widest: int) -> int:
    """The next power of two; at most the whole table."""
    return min(1 << (width - 1).bit_length(), widest)
