"""A system spread over machines: what distance between them does to throughput and latency.

Postgres, Redis, an API and two workers have a network namespace each, and packets between them are
delayed and lost by chance, in three arrangements: all at one place; each far from each, as in zones
of a cloud; the workers far from the rest, as GPUs that are rented elsewhere. The same processes run
the same jobs in each. Needs root and the TUN driver.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

from app.bench.mill import Host, Mill
from app.bench.report import machine, print_json, print_table
from app.errors import ConfigError
from gristmill_client import Client, JobState

_NET: Final = "10.77.0"
_HERE: Final = Host(f"{_NET}.1")
_PARTS: Final = ("postgres", "redis", "api-0", "worker-1", "worker-2")
HOSTS: Final = {
    name: Host(f"{_NET}.{number}", f"gristmill-{name}") for number, name in enumerate(_PARTS, 2)
}
WORKERS: Final = tuple(HOSTS[name].address for name in _PARTS if name.startswith("worker"))
LONE: Final = 7


@dataclass(slots=True)
class Trial:
    """Jobs over one arrangement."""

    name: str
    rtt_ms: float
    loss: float
    far: Seq[str] = WORKERS
    jobs_per_s: list[float] = field(default_factory=list)
    lone_ms: list[float] = field(default_factory=list)  #: from the submission to the answer
    cancel_ms: list[float] = field(default_factory=list)  #: from the call to the news of its end

    @property
    def rate(self) -> float:
        return median(self.jobs_per_s)


def main(arguments: Seq[str]) -> None:
    options = _parser().parse_args(arguments)
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        raise ConfigError("Network namespaces and their wires need root and /dev/net/tun.")
    trials = [
        Trial("one place", 0.0, 0.0),
        Trial("each apart", options.zones_ms, 0.0, far=()),
        *(Trial("workers far", rtt_ms, options.loss) for rtt_ms in options.rtt_ms),
    ]
    with _namespaces(), _wire() as wire, Mill(options.batch_size, options.step_ms, HOSTS) as mill:
        mill.start_rescue(0)
        with Client(*mill.start_apis(1), key=mill.key) as client:
            mill.grow(2)
            mill.run(64)  # warm
            for trial in trials:
                wire.set(trial)
                _try(mill, client, trial, options)
                print(f"{trial.name}, {trial.rtt_ms:g} ms: {trial.rate:.0f} jobs/s", flush=True)
    _print(trials, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench machines", description=__doc__)
    parser.add_argument("--zones-ms", type=float, default=1.0, help="there and back, each apart")
    parser.add_argument("--rtt-ms", type=float, nargs="+", default=[10, 50, 150])
    parser.add_argument("--loss", type=float, default=0.001, help="share of packets, each way, far")
    parser.add_argument("--jobs", type=int, default=2_000, help="of a bulk, each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--step-ms", type=float, default=10.0, help="of a batch in an engine")
    return parser


@contextmanager
def _namespaces() -> Iterator[None]:
    for host in HOSTS.values():
        subprocess.run(["ip", "netns", "add", host.namespace], check=True)
        up = ["ip", "-n", host.namespace, "link", "set", "lo", "up"]
        subprocess.run(up, check=True)
    try:
        yield
    finally:
        for host in HOSTS.values():
            subprocess.run(["ip", "netns", "delete", host.namespace], check=False)


class Wire:
    """The process that hands on packets, see `app.bench.wire`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._answer("up")

    def set(self, trial: Trial) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{trial.rtt_ms / 2} {trial.loss} {' '.join(trial.far)}\n")
        self._process.stdin.flush()
        self._answer("set")

    def _answer(self, word: str) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != word:
            raise ConfigError("The wire between the namespaces could not be laid; see above.")


@contextmanager
def _wire() -> Iterator[Wire]:
    ends = [f"{host.address}={host.namespace}" for host in (_HERE, *HOSTS.values())]
    process = subprocess.Popen(
        [sys.executable, "-m", "app.bench.wire", *ends],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Wire(process)
    finally:
        process.kill()
        process.wait()


def _try(mill: Mill, client: Client, trial: Trial, options: argparse.Namespace) -> None:
    def submit(words: str) -> str:
        return client.submit({"input": words}, url="/v1/embeddings")

    client.wait(submit("grist"))  # who was idle may have to connect anew
    for _ in range(LONE):
        began = time.monotonic()
        client.wait(submit("grist"))
        trial.lone_ms.append(1000 * (time.monotonic() - began))
    for _ in range(LONE):
        job_id = submit("sleep 600000")
        while client.job(job_id).state is not JobState.RUNNING:
            time.sleep(0.02)
        began = time.monotonic()
        client.cancel(job_id)
        client.wait(job_id)
        trial.cancel_ms.append(1000 * (time.monotonic() - began))
    trial.jobs_per_s = [
        options.jobs / mill.run(options.jobs).seconds for _ in range(options.rounds)
    ]


def _print(trials: Seq[Trial], options: argparse.Namespace) -> None:
    near = trials[0]
    print(f"\n{machine()}\n{options.jobs:,} jobs, {options.batch_size} a batch of ", end="")
    print(f"{options.step_ms:g} ms, two workers\n")
    columns = ["arrangement", "RTT ms", "lost %", "jobs/s", "of one place", "lone job ms"]
    print_table(
        [*columns, "cancel ms"],
        [
            [
                trial.name,
                f"{trial.rtt_ms:g}",
                f"{100 * trial.loss:g}",
                f"{trial.rate:.0f}",
                f"{trial.rate / near.rate:.2f}",
                f"{median(trial.lone_ms):.0f}",
                f"{median(trial.cancel_ms):.0f}",
            ]
            for trial in trials
        ],
    )
    print()
    named = {f"{trial.name} {trial.rtt_ms:g} ms": trial for trial in trials}
    print_json(
        "machines",
        {name: round(trial.rate / near.rate, 3) for name, trial in named.items()},
        lone_ms={name: round(median(trial.lone_ms)) for name, trial in named.items()},
        cancel_ms={name: round(median(trial.cancel_ms)) for name, trial in named.items()},
    )
