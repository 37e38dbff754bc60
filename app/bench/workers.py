"""One queue and 1 to 50 workers with stub engines: how much they do, how evenly, at what cost.

Postgres gives out its default of 100 connections, and beside the workers stand as many APIs and
rescue processes as a busy system has. At each number of workers jobs are put into the queue, and
what became of them is read from their rows: jobs a second from the first claim to the last commit,
Jain's index of the workers' shares (1 is even, 1/n is one that does all), and what a job took of
both servers and of CPUs. At the end all APIs are asked for much at once, to open all they may.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import Final

import httpx

from app.bench.mill import Connections, Mill, Run
from app.bench.report import machine, print_json, print_table

CONNECTIONS: Final = 97
"""Of Postgres' 100, without those that it keeps for superusers."""


@dataclass(slots=True)
class Level:
    """What so many workers did, in some rounds."""

    workers: int
    jobs: int  #: of a round
    runs: list[Run] = field(default_factory=list)
    connections: Connections = field(default_factory=Connections)

    @property
    def rate(self) -> float:
        return self.jobs / median(run.seconds for run in self.runs)

    @property
    def fairness(self) -> float:
        squares = (sum(share * share for share in run.shares) for run in self.runs)
        return median(self.jobs * self.jobs / (self.workers * each) for each in squares)

    @property
    def cpu_ms(self) -> dict[str, float]:
        """Of a job, by kind of part."""
        return {
            kind: round(median(run.cpu_ms[kind] for run in self.runs), 2)
            for kind in self.runs[0].cpu_ms
        }

    def middle(self, name: str) -> float:
        return float(median(getattr(run, name) for run in self.runs))


def main(arguments: Seq[str]) -> None:
    options = _parser().parse_args(arguments)
    levels = []
    with Mill(options.batch_size, options.step_ms) as mill:
        for number in range(options.rescues):
            mill.start_rescue(number)
        urls = mill.start_apis(options.apis)
        for number in sorted(options.workers):
            mill.grow(number)
            mill.run(64 * min(number, 8))  # warm
            level = Level(number, options.jobs)
            with mill.counted(level.connections):
                level.runs = [mill.run(options.jobs) for _ in range(options.rounds)]
            levels.append(level)
            print(f"{number} workers: {level.rate:.0f} jobs/s", flush=True)
        with mill.counted(levels[-1].connections):
            refused = _crowd(urls, mill.key)
        starved = mill.logged("has no connection left")
    _print(levels, refused, starved, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench workers", description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 50])
    parser.add_argument("--jobs", type=int, default=4_000, help="in the queue, each round")
    parser.add_argument("--rounds", type=int, default=2, help="at each number of workers")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--step-ms", type=float, default=50.0, help="of a batch in an engine")
    parser.add_argument("--apis", type=int, default=4)
    parser.add_argument("--rescues", type=int, default=2)
    return parser


def _crowd(urls: Seq[str], key: str, each: int = 32) -> int:
    """Submit to all APIs at once; how many jobs were refused."""
    job = {"url": "/v1/embeddings", "body": {"input": "grist"}}
    headers = {"x-api-key": key}
    with httpx.Client(timeout=60, headers=headers) as client, ThreadPoolExecutor(each) as pool:
        asked = pool.map(lambda url: client.post(f"{url}/v1/jobs", json=job), [*urls] * each)
        return sum(answer.is_error for answer in asked)


def _print(levels: Seq[Level], refused: int, starved: int, options: argparse.Namespace) -> None:
    most = levels[-1]
    print(f"\n{machine()}\n{options.apis} APIs and {options.rescues} rescues beside them; ", end="")
    print(f"{options.jobs:,} jobs, {options.batch_size} a batch of {options.step_ms:g} ms\n")
    print_table(
        [
            "workers",
            "jobs/s",
            "Jain",
            "CPU ms",
            "in a batch",
            "Redis trips",
            "commits",
            "connections",
        ],
        [
            [
                str(level.workers),
                f"{level.rate:.0f}",
                f"{level.fairness:.3f}",
                f"{sum(level.cpu_ms.values()):.2f}",
                *(f"{level.middle(name):.2f}" for name in ("batch_size", "trips", "commits")),
                str(level.connections.total),
            ]
            for level in levels
        ],
    )
    held = ", ".join(
        f"{name} {number}" for name, number in sorted(most.connections.by_part.items())
    )
    print(f"\nconnections, of {CONNECTIONS}: {held}; {refused} submissions refused\n")
    print_json(
        "workers",
        {
            "most_over_best": round(most.rate / max(level.rate for level in levels), 3),
            "fairness": round(most.fairness, 3),
            "connections": round(most.connections.total / CONNECTIONS, 2),
        },
        jobs_per_s={level.workers: round(level.rate, 1) for level in levels},
        redis_trips={level.workers: round(level.middle("trips"), 2) for level in levels},
        cpu_ms={level.workers: level.cpu_ms for level in levels},
        commits={level.workers: round(level.middle("commits"), 2) for level in levels},
        refused=refused,
        without_connection=starved,
    )
