"""Attention over a cache of pages, [page, BLOCK, kv_heads, dim], read in place.

One call takes decoding rows and chunks of prompts together: segments of one token go to a kernel
that cuts their contexts into parts, the others to one that takes tiles of tokens. Without Triton
the same is done in torch operations, segment by segment.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from app.engines.inflight.cache import BLOCK, KVCache, LayerShape
from app.engines.inflight.staging import COUNT, FIRST, START, TABLE, Room, Views

_TILE: Final = 64
"""Queries of one program, heads times tokens."""

INTERPRETED = False
"""Whether kernels run on CPUs too: tests show in Triton's interpreter that they are right."""

_FEW: Final = 4
"""Rows that do not fill the chip."""

_TAKEN: Final = 256
"""Tokens that one program takes."""

_LEAST: Final = 256
"""Tokens of a context that are not worth cutting."""


@functools.cache
def _module() -> Any:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("app.engines.inflight.kernels")


def kernels(device: torch.device) -> Any:
    """The compiled kernels, or None where there are none."""
    return _module() if device.type == "cuda" or INTERPRETED else None


def queries_of(shapes: Seq[LayerShape]) -> int:
    """Tokens of a tile: the same for all layers, so that they share one list of tiles."""
    return max(1, _TILE // max(shape.group for shape in shapes))


@dataclass(frozen=True, slots=True)
class Cut:
    """How the contexts of rows that decode are cut, and read, as was fastest on an H100."""

    splits: int  #: parts of a context at most
    block: int  #: tokens that are read at once
    warps: int
    stages: int

    @classmethod
    def of(cls, segments: int, dim: int, dtype: torch.dtype) -> Cut:
        """Few rows must fill the chip, many do so by themselves."""
        few = segments <= _FEW
        if dtype is torch.float32 or dim > 128:  # what is read at once must fit on the chip
            return cls(splits_of(segments), 32, 4, 2)
        return cls(splits_of(segments), *((128, 4, 2) if few else (64, 2, 3)))


def splits_of(segments: int) -> int:
    return 16 if segments <= _FEW else 8


def taken(tokens: Tensor, count: int, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, positions and slots, [count] int64 each, of staged tokens [4, ·]; what is pending comes
    from `last` [slots]."""
    compiled = kernels(tokens.device)
    if compiled is None:
        ids, positions, slots, rows = tokens[:, :count].long()
        return torch.where(ids < 0, last[rows], ids), positions, slots
    ids, positions, slots = torch.empty(3, count, dtype=torch.int64, device=tokens.device)
    compiled.take_tokens[(-(-count // _TAKEN),)](
        tokens, last, ids, positions, slots, count, tokens.stride(0), BLOCK=_TAKEN
    )
    return ids, positions, slots


class Scratch:
    """Where parts of contexts leave their results to be merged."""

    def __init__(self, shapes: Seq[LayerShape], num_rows: int, device: torch.device) -> None:
        most = max(_FEW * splits_of(_FEW), num_rows * splits_of(num_rows))
        heads = max(shape.kv_heads * shape.group for shape in shapes)
        widest = max(shape.kv_heads * shape.group * shape.dim for shape in shapes)
        self.partial = torch.empty(most * widest, dtype=torch.float32, device=device)
        self.extrema = torch.empty(most * heads * 2, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(num_rows * heads, dtype=torch.int32, device=device)


@dataclass(frozen=True, slots=True)
class Turn:
    """How the tokens of a layer are rotated, and normalised before if `eps` is given."""

    cos: Tensor  #: [positions, dim]
    sin: Tensor
    query_gain: Tensor  #: [dim]; anything without a norm
    key_gain: Tensor
    eps: float | None

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.cos, self.sin, self.query_gain, self.key_gain, self.eps or 0.0


class PagedStep:
    """Attention of one step, or of every step that a graph is replayed for."""

    def __init__(
        self,
        cache: KVCache,
        scratch: Scratch,
        room: Room,
        views: Views,
        positions: Tensor,
        slots: Tensor,
        queries: int,
    ) -> None:
        """`positions` [tokens] int64, and so `slots`: where the cache keeps each token."""
        self.cache = cache
        self.positions = positions
        self.slots = slots
        self.compiled = kernels(cache.keys[0].device)
        self._scratch = scratch
        self._room = room
        self._views = views
        self._queries = queries

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int,
        softcap: float,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """`attention.Step.attend`."""
        if sinks is not None:
            raise NotImplementedError("Sinks have no kernel here; models with them are refused.")
        for kept, new in ((self.cache.keys, key), (self.cache.values, value)):
            kept[layer].flatten(0, 1).index_copy_(0, self.slots, new.transpose(0, 1))
        return self.mix(layer, query.transpose(0, 1), scale=scale, window=window, softcap=softcap)

    def decode(
        self, layer: int, qkv: Tensor, turn: Turn, *, scale: float, window: int, softcap: float
    ) -> Tensor:
        """The same for rows that all decode, whose tokens are rotated and kept on the way.

        `qkv` [tokens, heads + 2 · kv_heads, dim] as the layer's product gives it → [tokens, heads,
        dim].
        """
        kv_heads = self.cache.keys[layer].shape[2]
        out = qkv.new_empty(len(qkv), qkv.shape[1] - 2 * kv_heads, qkv.shape[2])
        self._launch_rows(layer, qkv, out, turn, scale, window, softcap)
        return out

    @property
    def decodes(self) -> bool:
        """Whether every segment has one token."""
        return not self._room.tiles

    def mix(
        self, layer: int, query: Tensor, *, scale: float, window: int, softcap: float
    ) -> Tensor:
        """Queries [tokens, heads, dim] over what the layer has kept → the same shape."""
        if query.stride(2) != 1:
            query = query.contiguous()
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        out = query.new_empty(query.shape)
        if self.compiled is None:
            self._mix(query, keys, values, out, scale, window, softcap)
            return out
        self._launch_rows(layer, query, out, None, scale, window, softcap)
        if self._room.tiles:
            self._launch_chunks(layer, query, out, scale, window, softcap)
        return out

    def _launch_rows(
        self,
        layer: int,
        query: Tensor,
        out: Tensor,
        turn: Turn | None,
        scale: float,
        window: int,
        softcap: float,
    ) -> None:
        room, scratch = self._room, self._scratch
        shared = self._shared(layer, out, window, softcap)
        cut = Cut.of(room.segments, shared["BLOCK_D"], out.dtype)
        kv_heads, heads = shared["KV_HEADS"], shared["HEADS"]
        self.compiled.attend_rows[(room.segments, kv_heads, cut.splits)](
            *self._given(layer, query, out),
            scratch.partial,
            scratch.extrema,
            scratch.arrived,
            *(turn.arguments if turn else (query, query, query, query, 0.0)),
            scale,
            softcap,
            **shared,
            SPLITS=cut.splits,
            LEAST=_LEAST,
            BLOCK_G=max(16, _power(heads // kv_heads)),
            BLOCK_N=cut.block,
            ROTATE=turn is not None,
            NORM=turn is not None and turn.eps is not None,
            num_warps=cut.warps,
            num_stages=cut.stages,
        )

    def _launch_chunks(
        self, layer: int, query: Tensor, out: Tensor, scale: float, window: int, softcap: float
    ) -> None:
        tiles = self._views.tiles
        shared = self._shared(layer, out, window, softcap)
        kv_heads, exact = shared["KV_HEADS"], out.dtype is torch.float32
        self.compiled.attend_chunks[(self._room.tiles, kv_heads)](
            *self._given(layer, query, out),
            tiles,
            tiles.stride(0),
            scale,
            softcap,
            **shared,
            QUERIES=self._queries,
            BLOCK_M=max(16, _power(self._queries * shared["HEADS"] // kv_heads)),
            BLOCK_N=32 if exact or shared["BLOCK_D"] > 128 else 64,
            num_warps=4,
            num_stages=1 if exact else 2,
        )

    def _given(self, layer: int, query: Tensor, out: Tensor) -> tuple[Any, ...]:
        """What both kernels begin with."""
        keys, values, views = self.cache.keys[layer], self.cache.values[layer], self._views
        return (
            *(query, query.stride(0), query.stride(1), keys, values, out),
            *(views.segments, views.segments.stride(0), views.pages, views.counts),
        )

    def _shared(self, layer: int, out: Tensor, window: int, softcap: float) -> dict[str, Any]:
        """The constants of both kernels."""
        return {
            "WINDOW": window,
            "SOFTCAP": softcap > 0,
            "HEADS": out.shape[1],
            "KV_HEADS": self.cache.keys[layer].shape[2],
            "DIM": out.shape[2],
            "PAGE": BLOCK,
            "BLOCK_D": max(16, _power(out.shape[2])),
            "PRECISION": "ieee" if out.dtype is torch.float32 else "tf32",
        }

    def _mix(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
        scale: float,
        window: int,
        softcap: float,
    ) -> None:
        """In torch operations; looks at the segments on the host."""
        for segment in self._views.segments.T.tolist():
            first, count, start = segment[FIRST], segment[COUNT], segment[START]
            if not count:
                continue
            length = start + count
            pages = self._views.pages[segment[TABLE] :][: -(-length // BLOCK)].long()
            k = keys[pages].flatten(0, 1)[:length].transpose(0, 1)  # [kv_heads, length, dim]
            v = values[pages].flatten(0, 1)[:length].transpose(0, 1)
            q = query[first : first + count].transpose(0, 1)  # [heads, count, dim]
            q = q.reshape(len(k), -1, q.shape[-1])
            scores = (q @ k.transpose(1, 2)).float() * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            places = torch.arange(length, device=query.device)
            own = places[start:, None]
            seen = places <= own
            if window:
                seen &= places > own - window
            scores = scores.view(len(k), -1, count, length).masked_fill(~seen, float("-inf"))
            weights = scores.softmax(-1).to(v.dtype).flatten(1, 2)
            # What nobody sees may be anything, NaN too, and 0 · NaN is not 0.
            mixed = weights @ v.masked_fill(~seen.any(0)[:, None], 0)
            out[first : first + count] = mixed.view(-1, count, out.shape[-1]).transpose(0, 1)


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
