"""Ways to run the same requests: each takes them all and says how long it took."""

from __future__ import annotations

import functools
import itertools
import json
import math
import subprocess
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import psutil
import torch
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)

from app.bench.workloads import Request
from app.config.settings import ModelSettings
from app.engines.base import Sequence
from app.engines.checkpoint.loading import load_model
from app.engines.device import pick_device, pick_dtype
from app.engines.inflight.engine import InflightEngine
from app.jobs import Kind, SamplingParams

SAMPLE: Final = 8
"""One at a time takes so long that only this many requests are run that way."""

STATIC_SAMPLE: Final = 64
"""The first so many for static batches: how fast one is does not depend on how many follow."""


@dataclass(frozen=True, slots=True)
class Outcome:
    requests: int
    tokens: int  #: of the answers that were asked for
    seconds: float
    efficiency: float | None = None  #: useful / computed row-steps; None if it cannot be seen
    longest_step_ms: float = 0.0
    cpu_seconds: float = 0.0  #: of all threads, those that wait by spinning included; 0: not known

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


Contestant = Callable[[Seq[Request]], Outcome]


@dataclass(frozen=True, slots=True)
class Arena:
    """The model that all contestants run."""

    folder: Path
    device: str
    dtype: str
    cache_tokens: int

    @functools.cache  # noqa: B019  (one arena a run)
    def model(self) -> PreTrainedModel:
        """transformers' own model, for contestants that use `generate`."""
        device = pick_device(self.device)
        return load_model(AutoModelForCausalLM, self.folder, self.dtype, device)


def contestants(arena: Arena, peer_python: str | None, int8: bool) -> dict[str, Contestant]:
    """By name, in the order of the table. What they need is loaded when they first run."""
    entries: dict[str, Contestant] = {
        "one at a time": lambda requests: _static(arena, _spaced(requests, SAMPLE), 1),
        **{
            f"static {size}{', sorted' if ordered else ''}": functools.partial(
                _static_batches, arena, size, ordered
            )
            for size, ordered in itertools.product((8, 16, 32), (False, True))
        },
        "transformers continuous": functools.partial(_transformers_continuous, arena),
        **{f"inflight {rows}": Inflight(arena, rows) for rows in (16, 32, 64, 96)},
    }
    if int8:
        entries["64 with int8 weights"] = Inflight(arena, 64, "int8")
    if peer_python is not None:
        entries["vllm"] = Peer(arena, peer_python)
    return entries


def _spaced(requests: Seq[Request], count: int) -> list[Request]:
    """Evenly over all lengths, so that a sample has their mean."""
    ordered = sorted(requests, key=lambda request: request.num_tokens)
    step = len(ordered) / count
    return [ordered[int(step * (place + 0.5))] for place in range(count)]


def _static_batches(arena: Arena, size: int, ordered: bool, requests: Seq[Request]) -> Outcome:
    """In arrival order, or as if all had been known beforehand and sorted by length."""
    requests = requests[:STATIC_SAMPLE]
    if ordered:
        requests = sorted(requests, key=lambda each: (each.num_tokens, len(each.prompt)))
    return _static(arena, requests, size)


def _static(arena: Arena, requests: Seq[Request], size: int) -> Outcome:
    """Padded batches through `generate`; each runs until its longest answer is done."""
    model = arena.model()
    began, computed = time.perf_counter(), 0
    for start in range(0, len(requests), size):
        batch = requests[start : start + size]
        width = max(len(request.prompt) for request in batch)
        longest = max(request.num_tokens for request in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        with torch.inference_mode():
            cast(Any, model).generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=_greedy(longest),
            )
        computed += len(batch) * longest
    tokens = sum(request.num_tokens for request in requests)
    return Outcome(len(requests), tokens, time.perf_counter() - began, tokens / computed)


def _transformers_continuous(arena: Arena, requests: Seq[Request]) -> Outcome:
    """transformers' continuous batching: its cache sized to the work, its pages to the answers."""
    model = cast(Any, arena.model())
    longest = max(len(request.prompt) + request.num_tokens for request in requests)
    page = 32
    config = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=64 * math.ceil(longest / page),
        max_batch_tokens=512,
        max_requests_per_batch=64,
        use_cuda_graph=model.device.type == "cuda",
    )
    began = time.perf_counter()
    with model.continuous_batching_context_manager(
        generation_config=_greedy(1), continuous_batching_config=config
    ) as manager:
        for request in requests:
            manager.add_request(
                list(request.prompt), max_new_tokens=request.num_tokens, eos_token_id=-1
            )
        tokens = finished = 0
        while finished < len(requests):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching stopped by itself.")
            if result is not None and result.is_finished():
                finished += 1
                tokens += len(result.generated_tokens)
        seconds = time.perf_counter() - began
    model.set_attn_implementation("sdpa")  # continuous batching leaves another behind
    return Outcome(len(requests), tokens, seconds)


def _greedy(num_tokens: int) -> GenerationConfig:
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )


class Inflight:
    """Our engine, loaded once. Each round is a tenant of its own: no prefix outlives a round."""

    def __init__(self, arena: Arena, rows: int, weights: str = "full") -> None:
        self._arena = arena
        self._rows = rows
        self._weights = weights
        self._rounds = itertools.count()

    @functools.cached_property
    def engine(self) -> InflightEngine:
        settings = ModelSettings(
            source="bench",
            kind=Kind.GENERATE,
            engine="inflight",
            dtype=cast(Any, self._arena.dtype),
            max_batch_size=self._rows,
            options={"cache_tokens": self._arena.cache_tokens, "weights": self._weights},
        )
        return InflightEngine(self._arena.folder, settings, self._arena.device, 0, lambda: None)

    def __call__(self, requests: Seq[Request]) -> Outcome:
        sequences = list(self._sequences(requests))
        self.engine.take_stats()
        began, longest, cpu_began = time.perf_counter(), 0.0, time.process_time()
        self.engine.admit("bench", sequences)
        tokens = 0
        while self.engine.has_work:
            step_began = time.perf_counter()
            tokens += sum(len(each.token_ids) for each in self.engine.step())
            longest = max(longest, time.perf_counter() - step_began)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        stats = self.engine.take_stats()
        useful = sum(each.useful_tokens for each in stats)
        computed = sum(each.padded_tokens for each in stats)
        efficiency = useful / computed
        return Outcome(len(sequences), tokens, seconds, efficiency, 1e3 * longest, cpu_seconds)

    def _sequences(self, requests: Seq[Request]) -> Iterator[Sequence]:
        tenant = f"round-{next(self._rounds)}"
        for place, request in enumerate(requests):
            params = SamplingParams(request.num_tokens, temperature=0.0, ignore_eos=True)
            yield Sequence(place, request.prompt, params, tenant=tenant)


class Peer:
    """vLLM in a Python environment of its own, started once; see peer.py."""

    def __init__(self, arena: Arena, python: str) -> None:
        self._arena = arena
        self._python = python

    @functools.cached_property
    def _process(self) -> subprocess.Popen[str]:
        script = Path(__file__).with_name("peer.py")
        # By itself vLLM takes the precision of the file, which this processor may not compute in.
        dtype = pick_dtype(self._arena.dtype, pick_device(self._arena.device))
        return subprocess.Popen(
            [self._python, str(script), str(self._arena.folder), str(dtype).removeprefix("torch.")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, requests: Seq[Request]) -> Outcome:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        work = [[list(request.prompt), request.num_tokens] for request in requests]
        cpu_began = _cpu_seconds(process.pid)
        process.stdin.write(json.dumps(work) + "\n")
        process.stdin.flush()
        for line in process.stdout:  # libraries print here too
            if line.startswith('{"peer"'):
                result = json.loads(line)
                cpu_seconds = _cpu_seconds(process.pid) - cpu_began
                return Outcome(
                    len(requests), result["tokens"], result["seconds"], cpu_seconds=cpu_seconds
                )
        raise RuntimeError(f"The peer ended with exit code {process.wait()}.")


def _cpu_seconds(pid: int) -> float:
    """Of a process and what it has started."""
    first = psutil.Process(pid)
    times = [each.cpu_times() for each in (first, *first.children(recursive=True))]
    return sum(each.user + each.system for each in times)
