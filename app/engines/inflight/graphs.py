"""Steps as recorded CUDA graphs: one launch instead of hundreds.

A graph depends on nothing but how many tokens it has room for: the kernels find contexts, pages and
parts of prompts in the step's numbers (`staging`), so a graph serves every step that fits. There
are graphs of rows that all decode, and of steps with a part of a prompt among them. All are
recorded while the model loads, the largest first: the others find room in its memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Final

import torch
from torch import Tensor

from app.engines.inflight.staging import Order, Room

log = logging.getLogger(__name__)

Work = Callable[[], tuple[Tensor, Tensor]]
"""Gives logits [samples, vocab] and tokens [samples], in memory that the next step writes anew."""

Record = Callable[[Work], Work]
"""Takes work, and gives what does the same work again, into the same memory."""

_ROWS: Final = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_TOKENS: Final = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""With parts of prompts; beyond, a step takes so long that the launches hide behind it."""


def rooms(num_rows: int, max_tokens: int, queries: int) -> list[Room]:
    """Of all graphs, by size: for up to `num_rows` rows and `max_tokens` tokens of prompts."""
    rows = sorted({*(each for each in _ROWS if each < num_rows), num_rows})
    most = num_rows + max_tokens
    tokens = sorted({min(each, most) for each in _TOKENS})
    return [
        *(Room(each, each, 0, each) for each in rows),
        *(mixed_room(each, num_rows, queries) for each in tokens),
    ]


def mixed_room(tokens: int, num_rows: int, queries: int) -> Room:
    """For any step of so many tokens: each segment may end in a tile that is not full."""
    segments = min(tokens, num_rows)
    return Room(tokens, segments, tokens // queries + segments, segments)


def exact_room(order: Order, num_due: int) -> Room:
    """For this step alone."""
    return Room(order.num_tokens, len(order.segments), order.num_tiles, max(1, num_due))


class Graphs:
    """The recorded steps. `fits` is None for a step that has none."""

    def __init__(self, recorded: dict[Room, Work]) -> None:
        self.recorded = recorded
        self._rows = sorted((room for room in recorded if not room.tiles), key=_tokens)
        self._mixed = sorted((room for room in recorded if room.tiles), key=_tokens)

    def fits(self, order: Order) -> Room | None:
        """The smallest that holds the step."""
        among = self._mixed if order.num_tiles else self._rows
        return next((room for room in among if room.tokens >= order.num_tokens), None)


def record_all(wanted: Iterable[Room], record: Callable[[Room], Work]) -> dict[Room, Work]:
    """Record the largest first. If one cannot be, there are none: each step is then launched."""
    recorded: dict[Room, Work] = {}
    for room in sorted(wanted, key=_tokens, reverse=True):
        try:
            recorded[room] = record(room)
        except RuntimeError as error:
            log.warning(
                "steps are not recorded as CUDA graphs and will be slower: %s",
                str(error).partition("\n")[0],
            )
            return {}
    return recorded


class CudaRecorder:
    """Records work as a CUDA graph. All graphs share their memory: only one runs at a time.

    All are recorded on one stream, where the first calls of libraries are made as well: what those
    set up belongs to the stream.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, work: Work) -> Work:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            out = work()

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return out

        return replay


def _tokens(room: Room) -> int:
    return room.tokens
