"""What the device has to be told of a step, laid out for one transfer.

Everything is int32 in one flat buffer, in an order that `Room` fixes: tokens, segments, counts,
tiles, samples, and last, since its length is any, the pages of the segments. The same `Room` gives
the views of the buffer in pinned memory and of the one on the device. A recorded graph has a room
of its own; what a step does not fill of it writes to where nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from app.engines.inflight.cache import BLOCK
from app.engines.inflight.scheduler import Segment
from app.engines.sampling.plans import GREEDY_BELOW
from app.jobs import SamplingParams

PENDING: Final = -1
"""A token that was sampled and not yet read: the device knows it."""

TOKEN, POSITION, SLOT, ROW = range(4)
"""Of each token: id or PENDING, position in its sequence, page · BLOCK + place, row's slot."""

TABLE, FIRST, COUNT, START = range(4)
"""Of each segment: where its pages begin, its first token, its tokens, the first's position."""

END, SAMPLE_ROW, LOW_KEY, HIGH_KEY, TOP_K, TEMPERATURE, TOP_P, MIN_P = range(8)
"""Of each sample: the token whose logits count, its row's slot, and how to draw. The last three
are float32."""

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Room:
    """How much a step may hold. Each part begins at a multiple of 16 bytes."""

    tokens: int
    segments: int
    tiles: int
    samples: int

    @property
    def size(self) -> int:
        """Numbers before the pages."""
        return sum(rows * _up(width) for rows, width in self._parts())

    def views(self, buffer: Any) -> Views:
        """Of a flat array or tensor of int32."""
        found: list[Any] = []
        begin = 0
        for rows, width in self._parts():
            end = begin + rows * _up(width)
            found.append(buffer[begin:end].reshape(rows, _up(width)))
            begin = end
        found.append(buffer[begin:])
        return Views(*found)

    def _parts(self) -> tuple[tuple[int, int], ...]:
        return (
            *((4, self.tokens), (4, self.segments), (1, 2)),
            *((2, self.tiles), (8, self.samples)),
        )


@dataclass(frozen=True, slots=True)
class Views:
    """Arrays of numpy or tensors, widths rounded up to multiples of 4."""

    tokens: Any  #: [4, tokens]
    segments: Any  #: [4, segments]
    counts: Any  #: [1, 2] segments of one token, which come first; tiles
    tiles: Any  #: [2, tiles] of the other segments: which, and how many of its tokens come before
    samples: Any  #: [8, samples]
    pages: Any  #: [any] of the segments, one after the other


@dataclass(frozen=True, slots=True)
class Order:
    """The segments of a step as the device sees them: those of one token first."""

    segments: list[Segment]
    num_single: int
    num_tokens: int
    num_tiles: int

    @classmethod
    def of(cls, segments: Seq[Segment], queries: int) -> Order:
        single = [each for each in segments if each.count == 1]
        others = [each for each in segments if each.count > 1]
        tiles = sum(-(-each.count // queries) for each in others)
        total = len(single) + sum(each.count for each in others)
        return cls([*single, *others], len(single), total, tiles)


class Samplers:
    """How the row in each slot draws, kept so that a step takes it without Python for each."""

    def __init__(self, num_rows: int) -> None:
        self._seeds = np.zeros(num_rows, np.uint64)
        self._numbers = np.zeros((4, num_rows), np.float32)  # top_k's bits among them
        self._top_k = self._numbers[0].view(np.int32)

    def put(self, slot: int, params: SamplingParams, seed: int) -> None:
        self._seeds[slot] = seed & (2**64 - 1)
        self._top_k[slot] = min(params.top_k, 2**31 - 1)
        draws = params.temperature >= GREEDY_BELOW
        temperature = params.temperature if draws else 0.0
        self._numbers[1:, slot] = temperature, params.top_p, params.min_p

    def fill(self, samples: np.ndarray, slots: np.ndarray, positions: np.ndarray) -> None:
        """Write the lines of `samples` [8, ·] that say how to draw; `positions` in the output."""
        count = len(slots)
        keys = mixed(mixed(self._seeds[slots]) + positions.astype(np.uint64) * _GOLDEN)
        samples[LOW_KEY, :count] = (keys & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.int32)
        samples[HIGH_KEY, :count] = (keys >> np.uint64(32)).astype(np.uint32).view(np.int32)
        samples[TOP_K : MIN_P + 1, :count] = self._numbers[:, slots].view(np.int32)


def fill(
    views: Views, order: Order, tables: np.ndarray, scrap: int, num_rows: int, queries: int
) -> int:
    """Write all but how to draw; how many pages were written.

    `tables` [rows, pages] are the pages of each row, `scrap` is a page that nobody reads, and
    `num_rows` the slot of a row that does not exist.
    """
    rows, starts, counts = np.array(
        [(each.row.slot, each.start, each.count) for each in order.segments], np.int64
    ).T
    token_ids = [
        token
        for each in order.segments
        for token in each.row.tokens[each.start : each.start + each.count]
    ]
    tokens = views.tokens
    tokens[:, order.num_tokens :] = np.array([0, 0, scrap * BLOCK, num_rows])[:, None]
    num_pages = write(views, token_ids, rows, starts, counts, order.num_single, tables, queries)
    due = np.array([each.is_last for each in order.segments])
    num_due = int(due.sum())
    views.samples[:] = 0
    views.samples[SAMPLE_ROW] = num_rows
    views.samples[END, :num_due] = (np.cumsum(counts) - 1)[due]
    views.samples[SAMPLE_ROW, :num_due] = rows[due]
    return num_pages


def write(
    views: Views,
    token_ids: Seq[int] | np.ndarray,
    rows: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
    num_single: int,
    tables: np.ndarray,
    queries: int,
) -> int:
    """Write tokens, segments and pages; how many pages. `rows`, `starts` and `counts` are of the
    segments, of which the first `num_single` have one token."""
    firsts = np.cumsum(counts) - counts
    count, num_tokens = len(rows), len(token_ids)
    positions = np.arange(num_tokens) + np.repeat(starts - firsts, counts)
    token_rows = np.repeat(rows, counts)
    tokens = views.tokens
    tokens[TOKEN, :num_tokens] = token_ids
    tokens[POSITION, :num_tokens] = positions
    tokens[SLOT, :num_tokens] = tables[token_rows, positions // BLOCK] * BLOCK + positions % BLOCK
    tokens[ROW, :num_tokens] = token_rows

    used = (starts + counts - 1) // BLOCK + 1
    ends = np.cumsum(used)
    wanted = np.arange(used.max()) < used[:, None]
    views.pages[: ends[-1]] = tables[rows, : wanted.shape[1]][wanted]
    views.segments[:] = 0
    views.segments[:, :count] = ends - used, firsts, counts, starts
    number = -(-counts[num_single:] // queries)
    num_tiles = int(number.sum())
    views.counts[0, :2] = num_single, num_tiles
    before = np.arange(num_tiles) - np.repeat(np.cumsum(number) - number, number)
    views.tiles[0, :num_tiles] = np.repeat(np.arange(num_single, count), number)
    views.tiles[1, :num_tiles] = before * queries
    return int(ends[-1])


def mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64 of each: [n] uint64 → the same."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    out: np.ndarray = x ^ (x >> np.uint64(31))
    return out


def _up(width: int) -> int:
    return -(-width // 4) * 4
