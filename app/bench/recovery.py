"""How long the jobs of a killed worker take to be done, against what that must take at least.

The worker's process group is killed in the middle of a batch. The bound is the lease, the reload of
the models by the worker that takes its place, and the last job's own run, all measured in this run.
A queue that relies on Redis's visibility timeout alone waits for that first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from statistics import median

from app.bench.outcomes import good
from app.bench.report import machine, print_json, print_table
from app.bench.system import Bench
from app.config.file import load
from app.local.supervisor import System
from gristmill_client import Client, JobState

PLAIN_TIMEOUT_S = 3_600.0
"""Celery's default visibility timeout on Redis."""


@dataclass(frozen=True, slots=True)
class Recovery:
    affected: int  #: jobs that ran when the worker was killed
    lost: int  #: of all that were submitted
    took_s: float  #: from the kill to the end of the last affected job
    lease_s: float
    reload_s: float  #: start of the next worker's process until it was ready
    run_s: float  #: of the last affected job, when it ran again

    @property
    def bound_s(self) -> float:
        return self.lease_s + self.reload_s + self.run_s


def main(arguments: Seq[str]) -> None:
    options = _parser().parse_args(arguments)
    with ExitStack() as held:
        system = held.enter_context(System(load(), print))
        client = held.enter_context(Client(system.settings.api.url))
        bench = Bench(system, client)
        lease_s = system.settings.worker.lease_s
        _submit(client, 4, 8, bench)  # warm
        found = [
            _recover(bench, options.requests, options.tokens, lease_s)
            for _ in range(options.rounds)
        ]
    _print(found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench recovery", description=__doc__)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    return parser


def _submit(client: Client, number: int, tokens: int, bench: Bench | None = None) -> list[str]:
    """Send jobs; with `bench`, wait for them as well."""
    body = {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
    prompts = ("A grist mill is a place where " * (tokens // 6) for _ in range(number))
    answers = client.submit_many({"body": body | {"prompt": prompt}} for prompt in prompts)
    ids = [*map(good, answers)]
    if bench:
        bench.wait(lambda: bench.ended(ids))
    return ids


def _recover(bench: Bench, number: int, tokens: int, lease_s: float) -> Recovery:
    ids = _submit(bench.client, number, tokens)
    affected = bench.wait(lambda: _running(bench.client, ids))
    ready = bench.logged("The worker is ready.")
    killed_at = time.time()
    bench.kill_worker()
    affected = _running(bench.client, ids) or affected
    next_worker = bench.wait(bench.worker)
    bench.wait(lambda: bench.logged("The worker is ready.") > ready)
    reload_s = time.time() - next_worker.create_time()
    jobs = bench.wait(lambda: bench.ended(ids), pause_s=0.5)
    last = max((job for job in jobs if job.id in affected), key=lambda job: _stamp(job.raw))
    run = last.raw["attempts"][-1]
    return Recovery(
        affected=len(affected),
        lost=sum(job.state is not JobState.COMPLETED for job in jobs),
        took_s=_stamp(last.raw) - killed_at,
        lease_s=lease_s,
        reload_s=reload_s,
        run_s=_stamp(last.raw) - datetime.fromisoformat(run["claimed_at"]).timestamp(),
    )


def _running(client: Client, ids: list[str]) -> list[str]:
    return [job_id for job_id in ids if client.job(job_id).state is JobState.RUNNING]


def _stamp(job: dict[str, str]) -> float:
    return datetime.fromisoformat(job["finished_at"]).timestamp()


def _print(found: Seq[Recovery]) -> None:
    print(f"\n{machine()}\n")
    rows = [
        [
            f"round {number}: {each.affected} jobs were running, {each.lost} lost",
            *(f"{s:.1f}" for s in (each.lease_s, each.reload_s, each.run_s, each.bound_s)),
            f"{each.took_s:.1f}",
            f"{PLAIN_TIMEOUT_S + each.run_s:.0f}",
        ]
        for number, each in enumerate(found, 1)
    ]
    columns = ["kill -9 of the worker", "lease s", "reload s", "run s", "bound s", "took s"]
    print_table([*columns, "visibility timeout s"], rows)
    ratio = median(each.took_s / each.bound_s for each in found)
    print_json(
        "recovery",
        {"over_bound": round(ratio, 3)},
        lost=sum(each.lost for each in found),
        affected=sum(each.affected for each in found),
    )
