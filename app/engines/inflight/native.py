"""The CPU kernel of attention: attention.cpp, compiled once with the machine's own compiler.

The compiled file lies beside Python's own in __pycache__; where that cannot be written, each start
compiles anew. Without a compiler `load` says so and returns None, and `attention.PortableStep` does
the same work more slowly.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from app.engines.inflight.attention import Packed
from app.engines.inflight.cache import KVCache

log = logging.getLogger(__name__)

_SOURCE: Final = Path(__file__).with_name("attention.cpp")
_FLAGS: Final = (
    *("-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-std=c++17"),
    *("-fopenmp", "-shared", "-fPIC"),
)
_LANES: Final = 16
"""Head sizes must be a multiple of this. attention.cpp says the same."""

_RUN: Final = 16
"""Most tokens that the kernel treats at once. attention.cpp says the same."""

_KERNELS: Final = {torch.float32: "attend_float32", torch.bfloat16: "attend_bfloat16"}


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("runs", "tables", "slots")),
        *((name, ctypes.c_int32) for name in ("num_runs", "num_segments", "table_width")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "keys", "values", "out")),
        *((name, ctypes.c_int64) for name in ("query_token", "query_head", "key_token")),
        *((name, ctypes.c_int64) for name in ("key_head", "value_token", "value_head")),
        *((name, ctypes.c_int32) for name in ("heads", "kv_heads", "dim", "window")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


class NativeKernel:
    """The compiled function for one cache."""

    def __init__(self, library: ctypes.CDLL, cache: KVCache) -> None:
        self.cache = cache
        self.function = getattr(library, _KERNELS[cache.keys[0].dtype])
        self.layers = [
            _Layer(keys=keys.data_ptr(), values=values.data_ptr())
            for keys, values in zip(cache.keys, cache.values, strict=True)
        ]


class NativeStep:
    """Attention of one step through the kernel. Holds every array that the kernel reads."""

    def __init__(self, kernel: NativeKernel, packed: Packed, tables: np.ndarray) -> None:
        self._kernel = kernel
        self._held = _runs(packed.segments), tables, packed.slots
        runs = self._held[0]
        self._step = _Step(
            *(array.ctypes.data for array in self._held),
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
    ) -> Tensor:
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
        self._kernel.function(ctypes.byref(self._step), ctypes.byref(to))
        return out


def _runs(segments: np.ndarray) -> np.ndarray:
    """Segments cut into runs of at most _RUN tokens: [runs, 4] int32."""
    if segments[:, 2].max() <= _RUN:
        return segments
    cut = [
        (row, first + done, min(_RUN, count - done), position + done)
        for row, first, count, position in segments.tolist()
        for done in range(0, count, _RUN)
    ]
    return np.array(cut, np.int32)


def load(cache: KVCache) -> NativeKernel | None:
    """The kernel for this cache, or None where it cannot be had."""
    part = cache.keys[0]
    if part.device.type != "cpu" or part.dtype not in _KERNELS:
        return None
    if any(keys.shape[2] % _LANES for keys in cache.keys):
        return None
    library = _library()
    return None if library is None else NativeKernel(library, cache)


def _library() -> ctypes.CDLL | None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        log.warning("no C++ compiler: attention runs in torch operations, which is slower")
        return None
    file = _SOURCE.parent / "__pycache__" / f"attention-{_fingerprint(compiler)}.so"
    try:
        with tempfile.TemporaryDirectory() as folder:
            if file.exists():
                return ctypes.CDLL(str(file))
            fresh = Path(folder) / file.name
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(fresh)]
            subprocess.run(command, check=True, capture_output=True)
            _keep(fresh, file)
            return ctypes.CDLL(str(fresh))
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("attention.cpp could not be compiled (%s): attention is slower", error)
        return None


def _keep(fresh: Path, file: Path) -> None:
    """Leave the compiled file for the next start, where only the installer may write."""
    try:
        file.parent.mkdir(exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        shutil.copy(fresh, part)
        part.replace(file)
    except OSError:
        log.info("the compiled attention kernel cannot be kept in %s", file.parent)


def _fingerprint(compiler: str) -> str:
    """What the compiled file depends on: source, flags, compiler, and this processor."""
    cpu: Any = Path("/proc/cpuinfo")
    features = [line for line in cpu.read_text().splitlines() if line.startswith("flags")][:1]
    parts = [_SOURCE.read_text(), *_FLAGS, compiler, *features]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
