"""A step on a CPU through our compiled kernels.

Where there are none, `load` returns None, and `attention.PortableStep` does the same work more
slowly.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from app.engines.inflight.attention import Packed
from app.engines.inflight.cache import KVCache
from app.engines.inflight.library import LANES, library
from app.engines.inflight.weights import Product
from app.engines.sampling import draws

_RUN: Final = 16
"""Most tokens that the kernel treats at once. kernels.h says the same."""

_KERNELS: Final = {torch.float32: "attend_float32", torch.bfloat16: "attend_bfloat16"}
_LAYERS: Final = {torch.float32: "layers_float32", torch.bfloat16: "layers_bfloat16"}

_LARGEST: Final = {torch.float32: "largest_float32", torch.bfloat16: "largest_bfloat16"}


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("runs", "tables", "slots", "lengths")),
        *((name, ctypes.c_int32) for name in ("num_runs", "num_segments", "table_width")),
    )


class Attention(ctypes.Structure):
    """`Attention` of kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "keys", "values", "out")),
        *((name, ctypes.c_int64) for name in ("query_token", "query_head", "key_token")),
        *((name, ctypes.c_int64) for name in ("key_head", "value_token", "value_head")),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "dim", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_void_p) for name in ("sinks", "bias")),
        ("reach", ctypes.c_int32),
    )


class Norm(ctypes.Structure):
    """`Norm` of layer.cpp; all zero for none."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gain", "bias")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("centred", "rounds")),
    )


class Layer(ctypes.Structure):
    """`Layer` of layer.cpp."""

    _fields_ = (
        *((name, Product) for name in ("qkv", "mixed", "gated", "down")),
        *((name, Norm) for name in ("before_attention", "after_attention")),
        *((name, Norm) for name in ("before_mlp", "after_mlp", "query", "key")),
        *((name, Norm) for name in ("attention_sum", "mlp_sum")),
        *((name, ctypes.c_int32) for name in ("width", "inner", "rotated", "across")),
        *((name, ctypes.c_int32) for name in ("activation", "gates", "place")),
        ("times", ctypes.c_float),
        ("attention", Attention),
    )


class Layers:
    """Layers of one model, one after the other, as the kernel takes them."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._held = layers
        self.pointers = (ctypes.POINTER(Layer) * len(layers))(*map(ctypes.pointer, layers))


class NativeKernel:
    """The compiled functions for one cache."""

    def __init__(self, compiled: ctypes.CDLL, cache: KVCache) -> None:
        self.cache = cache
        self.compiled = compiled
        self.function = getattr(compiled, _KERNELS[cache.keys[0].dtype])
        self.layers = (Attention * len(cache.keys))(
            *(
                Attention(keys=keys.data_ptr(), values=values.data_ptr())
                for keys, values in zip(cache.keys, cache.values, strict=True)
            )
        )


class NativeStep:
    """Attention of one step through the kernel. Holds every array that the kernel reads."""

    def __init__(
        self,
        kernel: NativeKernel,
        packed: Packed,
        tables: np.ndarray,
        lengths: np.ndarray | None = None,
    ) -> None:
        """`lengths` [rows] int32, if given, are the tokens of each row, which all see all."""
        self._kernel = kernel
        self._held = _runs(packed.segments), tables, packed.slots, lengths
        runs = self._held[0]
        self._step = _Step(
            *(None if array is None else array.ctypes.data for array in self._held),
            len(runs),
            len(packed.segments),
            tables.shape[1],
        )

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
        query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
        heads, num_tokens, dim = query.shape
        out = query.new_empty(num_tokens, heads, dim)
        to = self._kernel.layers[layer]
        to.query, to.key, to.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
        to.query_head, to.query_token = query.stride()[:2]
        to.key_head, to.key_token = key.stride()[:2]
        to.value_head, to.value_token = value.stride()[:2]
        to.out, to.heads, to.kv_heads, to.dim = out.data_ptr(), heads, len(key), dim
        to.window, to.scale, to.softcap = window, scale, softcap
        taking = None if sinks is None else sinks.detach().float().contiguous()
        to.sinks = None if taking is None else taking.data_ptr()
        self._kernel.function(ctypes.byref(self._step), ctypes.byref(to))
        return out

    def run(self, layers: Layers, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """Whole layers: x [1, tokens, width] → the same; cos and sin [1, tokens, rotated], None
        where nothing is rotated."""
        x = x.contiguous()
        turn = [None if part is None else part.to(x.dtype).contiguous() for part in (cos, sin)]
        out = torch.empty_like(x)
        arrays = (None if part is None else part.data_ptr() for part in (x, *turn, out))
        getattr(self._kernel.compiled, _LAYERS[x.dtype])(
            ctypes.byref(self._step),
            layers.pointers,
            len(layers.pointers),
            self._kernel.layers,
            *map(ctypes.c_void_p, arrays),
            x.shape[1],
        )
        return out


def largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """`draws.largest`, the maxima in float32, by the kernel where there is one."""
    compiled = library() if values.device.type == "cpu" and values.dtype in _LARGEST else None
    if compiled is None:
        return draws.largest(values)
    values = values.contiguous()
    tops = torch.empty(len(values), dtype=torch.float32)
    places = torch.empty(len(values), dtype=torch.int64)
    getattr(compiled, _LARGEST[values.dtype])(
        ctypes.c_void_p(values.data_ptr()),
        *values.shape,
        ctypes.c_void_p(tops.data_ptr()),
        ctypes.c_void_p(places.data_ptr()),
    )
    return tops, places


def _runs(segments: np.ndarray) -> np.ndarray:
    """Segments cut into runs: [runs, 4] int32.

    They are cut at positions that are multiples of _RUN, so that neighbours in memory that is
    written in pairs are in one run.
    """
    if segments[:, 2].max() <= _RUN:
        return segments
    cut = []
    for row, first, count, position in segments.tolist():
        done = 0
        while done < count:
            part = min(_RUN - (position + done) % _RUN, count - done)
            cut.append((row, first + done, part, position + done))
            done += part
    return np.array(cut, np.int32)


def load(cache: KVCache) -> NativeKernel | None:
    """The kernel for this cache, or None where it cannot be had."""
    part = cache.keys[0]
    if part.device.type != "cpu" or part.dtype not in _KERNELS:
        return None
    if any(keys.shape[2] % LANES for keys in cache.keys):
        return None
    compiled = library()
    return None if compiled is None else NativeKernel(compiled, cache)
