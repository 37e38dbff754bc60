"""Adaptive batches against the best fixed size and wait, simulated and then for real.

A trace whose rate changes a hundredfold is replayed over many settings, as `gristmill tune` does.
Of each policy the cheapest setting that keeps the same p95 is then run by a whole system: HTTP,
Redis, a worker, Postgres, and a stub engine whose batches take a + b·n, the policies in turns.

What is compared is the device's time in batches: it is what a device costs that others could use
meanwhile. A device that is kept for this model alone costs the same either way; its share of idle
time is printed. p95 is from the row's writing to the committed result, of all jobs of all rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence as Seq
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any, Final

import httpx

from app.bench.own_system import OwnSystem, model_entry
from app.bench.report import machine, print_json, print_table, spread
from app.config.settings import Policy
from app.jobs import JobState
from app.local.supervisor import System
from app.store import traffic
from app.store.database import Database
from app.tune.frontier import SHARE, Bench, Point, Ratio, Setting, ratios, total_ratio
from app.tune.replay import Arrival
from app.tune.report import SHARES, WAIT_COSTS
from app.tune.trace import from_zero, synthetic
from app.worker.policy import StepCost
from gristmill_client import Client

SIZES: Final = (16, 24, 32, 40, 48, 64)
MOST_TOKENS: Final = 1_000_000
BODY: Final = {"prompt": "x", "max_tokens": 1}


@dataclass(slots=True)
class Measured:
    """What rounds of one policy came to."""

    totals_ms: list[float] = field(default_factory=list)  #: of jobs
    device_s: list[float] = field(default_factory=list)  #: of rounds
    batches: int = 0

    @property
    def p95_ms(self) -> float:
        ordered = sorted(self.totals_ms)
        return ordered[int(SHARE * (len(ordered) - 1))]


def main(arguments: Seq[str]) -> None:
    options = _parser().parse_args(arguments)
    trace = from_zero(synthetic(options.traffic, options.jobs, options.seed))
    cost = StepCost(options.fixed_ms * 1e6, options.row_ms * 1e6)
    bench = Bench(trace, cost, MOST_TOKENS)
    bench.search(SIZES, Setting(max(SIZES), options.fixed_ms))
    points = list(bench.points.values())
    found = ratios(points, SHARES)
    print(f"{machine()}\n{options.traffic}, {options.jobs} jobs, simulated:\n", flush=True)
    _print_ratios(found)
    priced = {f"{each:g}": round(total_ratio(points, each), 3) for each in WAIT_COSTS}
    print(f"\nwith every second of waiting priced in device seconds: {priced}")
    told: dict[str, Any] = {
        "simulated": {f"{each.p95_ms:.0f}": round(each.device, 3) for each in found},
        "with_waiting": priced,
    }
    if options.rounds:
        at = found[min(options.at, len(found) - 1)]
        measured = _measure(options, trace, at)
        told |= _print_measured(at, measured, options)
    print()
    print_json("policy", told, traffic=options.traffic, jobs=options.jobs)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench policy", description=__doc__)
    parser.add_argument("--traffic", default="steps:1-100/20", help="as for `gristmill tune`")
    parser.add_argument("--jobs", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fixed-ms", type=float, default=100.0, help="a of the stub engine")
    parser.add_argument("--row-ms", type=float, default=8.0, help="b of the stub engine")
    parser.add_argument("--rounds", type=int, default=2, help="for real; 0 simulates alone")
    parser.add_argument("--at", type=int, default=1, help="which of the p95s to run, from 0 on")
    return parser


def _model(name: str, setting: Setting, options: argparse.Namespace) -> str:
    batch: dict[str, Any] = {"policy": setting.policy.value}
    if setting.wait_cost is not None:
        batch["wait_cost"] = setting.wait_cost
    return model_entry(
        name,
        default=setting.policy is Policy.FIXED,
        max_batch_size=setting.max_batch_size,
        max_batch_tokens=MOST_TOKENS,
        max_wait_ms=float(setting.max_wait_ms),
        options={"step_ms": options.fixed_ms, "row_ms": options.row_ms},
        batch=batch,
    )


def _measure(options: argparse.Namespace, trace: Seq[Arrival], at: Ratio) -> dict[Policy, Measured]:
    measured = {policy: Measured() for policy in Policy}
    models = "".join(
        _model(point.setting.policy.value, point.setting, options)
        for point in (at.fixed, at.adaptive)
    )
    with OwnSystem("", models) as system:
        for _ in range(options.rounds):
            for policy in Policy:
                _round(system, policy, trace, measured[policy])
    return measured


def _round(system: System, policy: Policy, trace: Seq[Arrival], measured: Measured) -> None:
    since, model = datetime.now(UTC), policy.value
    asyncio.run(_arrive(system.settings.api.url, model, trace))
    with Client(system.settings.api.url) as client:
        while any(client.jobs(state=state) for state in (JobState.QUEUED, JobState.RUNNING)):
            time.sleep(0.2)
        jobs = client.jobs(since=since)
    measured.totals_ms += [job.raw["timing"]["total_ms"] for job in jobs]
    until = datetime.now(UTC) + timedelta(minutes=1)
    with (
        closing(Database(system.settings.database.url, pool_size=1)) as database,
        database.autocommit() as connection,
    ):
        ran = traffic.ran(connection, model, since, until, len(trace))
    measured.device_s.append(sum(each.device_ns for each in ran) / 1e9)
    measured.batches += len(ran)


async def _arrive(url: str, model: str, trace: Seq[Arrival]) -> None:
    """Submit each job when its time has come, whether or not earlier ones were answered."""
    body = {"body": BODY | {"model": model}}

    async def submit(http: httpx.AsyncClient) -> None:
        (await http.post("/v1/jobs", json=body)).raise_for_status()

    async with (
        httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http,
        asyncio.TaskGroup() as senders,
    ):
        began = time.monotonic()
        for job in trace:
            await asyncio.sleep(began + job.at_ns / 1e9 - time.monotonic())
            senders.create_task(submit(http))


def _described(point: Point) -> str:
    setting = point.setting
    cost = "" if setting.wait_cost is None else f", {setting.wait_cost:g}"
    return f"{setting.max_batch_size}, {setting.max_wait_ms:.0f} ms{cost}"


def _print_ratios(found: Seq[Ratio]) -> None:
    rows = [
        [
            f"{each.p95_ms:.0f}",
            _described(each.fixed),
            f"{each.fixed.device_ms_per_job:.2f}",
            _described(each.adaptive),
            f"{each.adaptive.device_ms_per_job:.2f}",
            f"{each.device:.3f}",
            f"{each.mean_latency:.2f}",
        ]
        for each in found
    ]
    columns = ["p95 ms at most", "fixed: size, wait", "device ms/job", "adaptive, wait_cost",
               "device ms/job", "ratio", "of mean latencies"]  # fmt: skip
    print_table(columns, rows)


def _print_measured(
    at: Ratio, measured: dict[Policy, Measured], options: argparse.Namespace
) -> dict[str, Any]:
    rows = []
    for point in (at.fixed, at.adaptive):
        each = measured[point.setting.policy]
        jobs = len(each.totals_ms)
        per_job = [1e3 * options.rounds * device_s / jobs for device_s in each.device_s]
        rows.append(
            [
                point.setting.policy.value,
                str(jobs),
                f"{jobs / each.batches:.1f}",
                f"{point.mean_size:.1f}",
                f"{each.p95_ms:.0f}",
                f"{point.p95_ms:.0f}",
                f"{median(per_job):.2f} ({spread(per_job, 2)})",
                f"{point.device_ms_per_job:.2f}",
                f"{1 - point.busy:.0%}",
            ]
        )
    print("\nfor real:\n")
    columns = ["policy", "jobs", "mean batch", "simulated", "p95 ms", "simulated",
               "device ms/job", "simulated", "idle, simulated"]  # fmt: skip
    print_table(columns, rows)
    fixed, adaptive = measured[Policy.FIXED], measured[Policy.ADAPTIVE]
    return {
        "device_adaptive_over_fixed": round(sum(adaptive.device_s) / sum(fixed.device_s), 3),
        "p95_adaptive_over_fixed": round(adaptive.p95_ms / fixed.p95_ms, 3),
    }
