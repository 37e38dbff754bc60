"""Overload: three times as many jobs as fit, from clients that come back as they are told.

The whole system runs with a stub engine of fixed speed, so the device is the limit and not this
machine. First its capacity is measured, with a backlog; then jobs come at that pace, then at three
times that pace, one by one and whether or not earlier ones were answered. Every job has a deadline;
a client that is refused waits as `Retry-After` says, and gives up when its deadline has passed.

Goodput counts jobs that completed before their deadline, per second, while jobs arrive; the peak is
that at the single pace, or the capacity if it is more.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

import httpx
import psutil

from app.bench.outcomes import good
from app.bench.own_system import OwnSystem, model_entry
from app.bench.report import machine, print_json, print_table
from app.local.supervisor import System
from gristmill_client import Client, Job, JobState

BODY: Final = {"prompt": "x", "max_tokens": 2}
STEPS: Final = 2
BATCH_SIZE: Final = 8
DEADLINE_S: Final = 12.0
HURRIED_S: Final = 2.0
"""Every fifth job has so little time that it expires in a queue of any length."""
QUEUE_S: Final = 5.0
"""The queue is bounded to what a device without pauses would drain in this time."""


@dataclass(slots=True)
class Phase:
    """What was asked and what came of it."""

    name: str
    seconds: float
    arrivals: int = 0
    refusals: int = 0
    given_up: int = 0
    latencies_s: list[float] = field(default_factory=list)  #: of each answer to a submission
    jobs: list[Job] = field(default_factory=list)
    until: datetime = field(default_factory=lambda: datetime.now(UTC))  #: the arrivals ended

    @property
    def in_time(self) -> int:
        """Completed before their deadline and before the arrivals ended."""
        return sum(
            job.state is JobState.COMPLETED
            and _time(job.raw["finished_at"]) <= min(_time(job.raw["deadline"]), self.until)
            for job in self.jobs
        )

    @property
    def goodput(self) -> float:
        return self.in_time / self.seconds

    @property
    def expired(self) -> int:
        return sum(job.state is JobState.EXPIRED for job in self.jobs)

    @property
    def ran_expired(self) -> int:
        """Attempts that were claimed when the deadline had passed."""
        return sum(
            _time(attempt["claimed_at"]) >= _time(job.raw["deadline"])
            for job in self.jobs
            for attempt in job.raw["attempts"]
        )

    def latency_ms(self, share: float) -> float:
        return 1000 * sorted(self.latencies_s)[int(share * (len(self.latencies_s) - 1))]


def main(arguments: Seq[str]) -> None:
    options = _parser().parse_args(arguments)
    most = BATCH_SIZE * max(3, round(QUEUE_S / (STEPS * options.step_ms / 1000)))
    stub = {"step_ms": options.step_ms}
    models = model_entry(max_batch_size=BATCH_SIZE, max_wait_ms=20, options=stub)
    with OwnSystem(f"max_queued_jobs = {most}", models) as system:
        url = system.settings.api.url
        _work_off(url, BATCH_SIZE)
        capacity = _capacity(url, most)
        print(f"{machine()}\ncapacity, with a backlog: {capacity:.1f} jobs/s\n", flush=True)
        peak = _run(url, Phase("1 ×", options.seconds), capacity)
        before = _memory_mb(system)
        over = _run(url, Phase("3 ×", options.seconds), 3 * capacity)
        after = _memory_mb(system)
    _print(capacity, peak, over, before, after)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench overload", description=__doc__)
    parser.add_argument("--seconds", type=float, default=40.0, help="of arrivals, for each pace")
    parser.add_argument("--step-ms", type=float, default=250.0, help="of the stub engine")
    return parser


def _capacity(url: str, number: int) -> float:
    """Jobs per second while more wait than fit: from the end of the first batch to that of all."""
    since = datetime.now(UTC)
    _work_off(url, number)
    with Client(url) as client:
        ends = sorted(_time(job.raw["finished_at"]) for job in client.jobs(since=since))
    return (number - BATCH_SIZE) / (ends[-1] - ends[BATCH_SIZE - 1]).total_seconds()


def _work_off(url: str, number: int) -> None:
    with Client(url) as client:
        for answer in client.submit_many([{"body": BODY}] * number):
            client.wait(good(answer), timeout_s=120)


def _run(url: str, phase: Phase, pace: float) -> Phase:
    """Let jobs arrive at this pace, and wait until all have ended."""
    since = datetime.now(UTC)
    phase.until = since + timedelta(seconds=phase.seconds)
    asyncio.run(_arrivals(url, phase, pace))
    with Client(url) as client:
        while client.jobs(state=JobState.QUEUED) or client.jobs(state=JobState.RUNNING):
            time.sleep(0.5)
        phase.jobs = client.jobs(since=since)
    return phase


async def _arrivals(url: str, phase: Phase, pace: float) -> None:
    chance = random.Random(phase.name)
    limits = httpx.Limits(max_connections=500, max_keepalive_connections=500)
    async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits, trust_env=False) as http:
        began = due = time.monotonic()
        async with asyncio.TaskGroup() as clients:
            while due < began + phase.seconds:
                await asyncio.sleep(due - time.monotonic())
                patience_s = HURRIED_S if phase.arrivals % 5 == 4 else DEADLINE_S
                clients.create_task(_client(http, phase, patience_s))
                phase.arrivals += 1
                due += chance.expovariate(pace)


async def _client(http: httpx.AsyncClient, phase: Phase, patience_s: float) -> None:
    """Submit one job, coming back as told, for as long as it can still be in time."""
    give_up_at = time.monotonic() + patience_s
    deadline = datetime.now(UTC) + timedelta(seconds=patience_s)
    job = {"body": BODY, "deadline": deadline.isoformat()}
    while True:
        asked_at = time.monotonic()
        answer = await http.post("/v1/jobs", json=job)
        phase.latencies_s.append(time.monotonic() - asked_at)
        if answer.status_code != 429:
            return
        phase.refusals += 1
        again_at = time.monotonic() + int(answer.headers["retry-after"])
        if again_at >= give_up_at:
            phase.given_up += 1
            return
        await asyncio.sleep(again_at - time.monotonic())


def _memory_mb(system: System) -> dict[str, float]:
    """Resident memory of each part, its children included, shared pages by their share."""
    used = {}
    for part in system.parts:
        root = psutil.Process(part.pid)
        family = [root, *root.children(recursive=True)]
        used[part.name] = sum(each.memory_full_info().pss for each in family) / 1e6
    return used


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _print(
    capacity: float, peak: Phase, over: Phase, before: dict[str, float], after: dict[str, float]
) -> None:
    columns = ["arrivals", "jobs/s", "refusals", "given up", "accepted", "in time", "goodput/s"]
    rows = [
        [
            phase.name,
            f"{phase.arrivals / phase.seconds:.1f}",
            str(phase.refusals),
            str(phase.given_up),
            str(len(phase.jobs)),
            str(phase.in_time),
            f"{phase.goodput:.2f}",
            str(phase.expired),
            str(phase.ran_expired),
            f"{phase.latency_ms(0.5):.0f} / {phase.latency_ms(0.99):.0f}",
        ]
        for phase in (peak, over)
    ]
    print_table([*columns, "expired", "ran expired", "submit ms p50 / p99"], rows)
    print()
    print_table(
        ["memory, MB", "before 3 ×", "after"],
        [[name, f"{before[name]:.0f}", f"{after[name]:.0f}"] for name in before],
    )
    ratios = {
        "goodput_over_peak": round(over.goodput / max(peak.goodput, capacity), 3),
        "memory_after_over_before": round(sum(after.values()) / sum(before.values()), 3),
        "ran_expired": over.ran_expired + peak.ran_expired,
    }
    print()
    print_json("overload", ratios, capacity=round(capacity, 2))
