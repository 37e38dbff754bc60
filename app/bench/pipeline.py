"""The whole path against a bare loop: what the queue, the batches and the commits cost.

The same prompts run twice a round, in turns: through HTTP, Redis, the worker and Postgres to the
last answer in its client's hands, and through the engine alone in a loop of this process. The ratio
is the tax, and the CPU seconds of each part say who takes it: on a machine whose cores the engine
keeps busy, two cores lose half a second to each that another part takes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence as Seq
from contextlib import ExitStack, suppress
from statistics import median

import psutil

from app.bench.outcomes import good
from app.bench.report import machine, print_json, print_table, spread
from app.bench.workloads import WORKLOADS, Request, make
from app.config.file import load
from app.config.settings import Settings
from app.engines import registry
from app.engines.base import Engine, Sequence
from app.engines.catalog import load_catalog
from app.jobs import Kind, SamplingParams
from app.local.supervisor import System
from app.worker.engine.host import LAUNCH
from gristmill_client import Client, JobFailed


def main(arguments: Seq[str]) -> None:
    options = _parser().parse_args(arguments)
    with ExitStack() as held:
        system = held.enter_context(System(load(), print))
        settings = system.settings
        model = settings.model_name(Kind.GENERATE, None)
        entry = load_catalog(settings, [model])[model]
        requests = make(options.workload, entry.tokenizer.encode_text, options.requests)
        engine = registry.create(
            entry.settings.engine,
            entry.folder,
            entry.settings,
            device=settings.worker.device,
            threads=settings.worker.threads,
            progress=lambda: None,
        )
        warm_up = requests[:8]
        run_path(settings, warm_up), _bare(engine, warm_up)
        path, bare, used = [], [], []
        for number in range(options.rounds):
            before = cpu_s(system)
            path.append(run_path(settings, requests))
            used.append({name: spent - before[name] for name, spent in cpu_s(system).items()})
            bare.append(_bare(engine, requests))
            print(f"round {number + 1}: path {path[-1]:.2f} s, bare {bare[-1]:.2f} s", flush=True)
    _print(options.workload, requests, path, bare, used)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench pipeline", description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, default="mixed")
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    return parser


def run_path(settings: Settings, requests: Seq[Request]) -> float:
    """Seconds from the submission of all to the answer to the last."""
    bodies = [
        {
            "prompt": list(request.prompt),
            "max_tokens": request.num_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        for request in requests
    ]
    with Client(settings.api.url, key=settings.api.key) as client:
        began = time.monotonic()
        accepted = client.submit_many([{"body": body} for body in bodies])
        for _, outcome in client.as_completed(map(good, accepted)):
            if (job := good(outcome)).response is None:
                raise JobFailed(job)
        return time.monotonic() - began


def _bare(engine: Engine, requests: Seq[Request]) -> float:
    """Seconds of the engine alone, fed as fast as it has room."""
    waiting = [
        Sequence(
            number,
            request.prompt,
            SamplingParams(request.num_tokens, temperature=0.0, ignore_eos=True),
        )
        for number, request in enumerate(requests)
    ]
    began = time.monotonic()
    while waiting or engine.has_work:
        rows = engine.free_rows
        if waiting and rows:
            engine.admit("bare", waiting[:rows])
            del waiting[:rows]
        engine.step()
    return time.monotonic() - began


def cpu_s(system: System) -> dict[str, float]:
    """Seconds that each part has computed so far, the engine process apart from its worker, and the
    client, which is this process."""
    used = {"client": sum(psutil.Process().cpu_times()[:2])}
    for part in system.parts:
        root = psutil.Process(part.pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error):
                name = "engine" if str(LAUNCH) in process.cmdline() else part.name.lower()
                used[name] = used.get(name, 0.0) + sum(process.cpu_times()[:2])
    return used


def _print(
    workload: str,
    requests: Seq[Request],
    path: Seq[float],
    bare: Seq[float],
    used: Seq[dict[str, float]],
) -> None:
    tokens = sum(request.num_tokens for request in requests)
    print(f"\n{machine()}\n{workload}: {len(requests)} requests, {tokens} output tokens\n")
    rows = [
        [name, f"{median(times):.2f}", spread(times, 2), f"{rate:.0f}"]
        for name, times in (("HTTP → Redis → engine → commit", path), ("bare engine loop", bare))
        for rate in [tokens / median(times)]
    ]
    print_table(["way", "seconds", "spread", "output tokens/s"], rows)
    cpu = {name: round(median(each[name] for each in used), 2) for name in used[0]}
    print("\nCPU seconds on the path: " + ", ".join(f"{name} {s}" for name, s in cpu.items()))
    ratio = median(a / b for a, b in zip(path, bare, strict=True))
    ratios = {"path_over_bare": round(ratio, 3)}
    print_json("pipeline", ratios, workload=workload, requests=len(requests), cpu_s=cpu)
