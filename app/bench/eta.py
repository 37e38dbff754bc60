"""What promises are worth: jobs come in bursts, and each is held to the p90 it was promised.

The whole system runs with a stub engine of fixed speed, which takes a batch when the one before is
over. Bursts of one to many jobs, of different lengths and in two priorities, come whether or not
earlier ones have ended; on the whole the device is busy for a part of the time. Nothing is known
when the first burst comes: the jobs of the warm-up teach, and are told apart.

    kept        share of the jobs that ended within the p90 they were promised when accepted
    told        that p90 over what the job took, of the middle job: 1 would be an oracle's
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from datetime import datetime
from statistics import median
from typing import Any, Final

import httpx

from app.bench.own_system import OwnSystem, model_entry
from app.bench.report import machine, print_json, print_table
from app.local.supervisor import System
from app.store import outlook
from app.store.database import Database
from app.store.outlook import EndedJob

BURSTS: Final = (1, 1, 2, 5, 10, 20, 40)
"""Jobs of a burst, each as likely."""
LENGTHS: Final = (2, 5, 10, 20, 40)
"""Tokens of an answer."""
PATIENT: Final = 6
"""Priority of one burst in four; the others have 0."""
BATCH_SIZE: Final = 8
MOST: Final = 100_000


@dataclass(frozen=True, slots=True)
class Burst:
    at_s: float
    priority: int
    lengths: tuple[int, ...]


def trace(seconds: float, busy: float, step_ms: float, seed: int) -> list[Burst]:
    """Bursts that keep the device busy for about this share of the time, when batches are full."""
    chance = random.Random(seed)
    bursts, at_s = [], 0.0
    while at_s < seconds:
        lengths = tuple(chance.choices(LENGTHS, k=chance.choice(BURSTS)))
        bursts.append(Burst(at_s, PATIENT if chance.random() < 0.25 else 0, lengths))
        # A batch lasts as long as its longest job.
        work_s = max(LENGTHS) * step_ms / 1000 * max(1.0, len(lengths) / BATCH_SIZE)
        at_s += work_s / busy * chance.expovariate(1.0)
    return bursts


def main(arguments: Seq[str]) -> None:
    options = _parser().parse_args(arguments)
    bursts = trace(options.seconds, options.busy, options.step_ms, options.seed)
    stub = {"step_ms": options.step_ms}
    model = model_entry(max_batch_size=BATCH_SIZE, max_wait_ms=20, options=stub)
    with OwnSystem("", model) as system:
        number = sum(len(burst.lengths) for burst in bursts)
        print(f"{machine()}\n{number} jobs in {len(bursts)} bursts\n", flush=True)
        database = Database(system.settings.database.url, pool_size=1)
        since = database.now()
        asyncio.run(_arrivals(system.settings.api.url, bursts))
        jobs = _ended(database, since, number)
        database.close()
        told = _metric(system)
    _print(jobs, options, told)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench eta", description=__doc__)
    parser.add_argument("--seconds", type=float, default=90.0, help="of arrivals")
    parser.add_argument("--warm-up", type=float, default=20.0, help="of these, seconds to learn in")
    parser.add_argument("--busy", type=float, default=0.7, help="share of the time, about")
    parser.add_argument("--step-ms", type=float, default=15.0, help="of the stub engine")
    parser.add_argument("--seed", type=int, default=1)
    return parser


async def _arrivals(url: str, bursts: Seq[Burst]) -> None:
    """Let the jobs come one by one, those of a burst at once."""

    async def submit(http: httpx.AsyncClient, length: int, priority: int) -> None:
        body = {"prompt": "x" * length, "max_tokens": length}
        answer = await http.post("/v1/jobs", json={"body": body, "priority": priority})
        answer.raise_for_status()

    limits = httpx.Limits(max_connections=50)
    async with (
        httpx.AsyncClient(base_url=url, timeout=60, limits=limits, trust_env=False) as http,
        asyncio.TaskGroup() as senders,
    ):
        began_s = time.monotonic()
        for burst in bursts:
            await asyncio.sleep(began_s + burst.at_s - time.monotonic())
            for length in burst.lengths:
                senders.create_task(submit(http, length, burst.priority))


def _ended(database: Database, since: datetime, number: int) -> list[EndedJob]:
    """All of them, in the order in which they were accepted, once they have ended."""
    while True:
        with database.autocommit() as connection:
            jobs = outlook.ended_since(connection, since, MOST)
        if len(jobs) >= number:
            return sorted(jobs, key=lambda job: job.due_at)
        time.sleep(0.5)


def _metric(system: System) -> float | None:
    """The share as the API itself tells it."""
    time.sleep(6)  # it looks at what has ended, also when nobody asks
    text = httpx.get(f"{system.settings.api.url}/metrics", trust_env=False).text
    found = re.search(r"^gristmill_eta_kept_share\S* (\S+)$", text, re.M)
    return float(found[1]) if found else None


def _took_ms(job: EndedJob) -> float:
    return (job.finished_at - job.due_at).total_seconds() * 1000


def _is_kept(job: EndedJob) -> bool:
    return job.quoted_p90_ms is not None and _took_ms(job) <= job.quoted_p90_ms


def _print(jobs: Seq[EndedJob], options: argparse.Namespace, metric: float | None) -> None:
    began = jobs[0].due_at
    promised = [job for job in jobs if job.quoted_p90_ms is not None]
    learning = [job for job in promised if (job.due_at - began).total_seconds() < options.warm_up]
    measured = promised[len(learning) :]
    groups: dict[str, Seq[EndedJob]] = {
        "warm-up": learning,
        "after it": measured,
        "  priority 0": [job for job in measured if job.priority == 0],
        f"  priority {PATIENT}": [job for job in measured if job.priority == PATIENT],
        "  took < 1 s": [job for job in measured if _took_ms(job) < 1000],
        "  1 to 4 s": [job for job in measured if 1000 <= _took_ms(job) < 4000],
        "  longer": [job for job in measured if _took_ms(job) >= 4000],
    }
    rows = [[name, *_row(group)] for name, group in groups.items() if group]
    print_table(["jobs accepted in", "jobs", "kept", "told", "took, s (median, most)"], rows)
    print(f"\nwithout a promise: {len(jobs) - len(promised)}; the API's own share: {metric}\n")
    ratios = {
        "kept_within_p90": round(_share(measured), 3),
        "p90_over_taken": round(_told(measured), 2),
    }
    details: dict[str, Any] = {"jobs": len(measured), "metric": metric, "seed": options.seed}
    print_json("eta", ratios, **details)


def _row(group: Seq[EndedJob]) -> list[str]:
    took_s = sorted(_took_ms(job) / 1000 for job in group)
    return [
        str(len(group)),
        f"{_share(group):.3f}",
        f"{_told(group):.2f}",
        f"{median(took_s):.2f}, {took_s[-1]:.1f}",
    ]


def _share(group: Seq[EndedJob]) -> float:
    return sum(map(_is_kept, group)) / max(1, len(group))


def _told(group: Seq[EndedJob]) -> float:
    return median([(job.quoted_p90_ms or 0.0) / max(_took_ms(job), 1.0) for job in group] or [0.0])
