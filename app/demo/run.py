"""`gristmill demo`: real prompts by every way, through the whole system, and their records."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID, uuid4

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from app.broker.client import connected
from app.broker.message import raw_message
from app.broker.queues import Layout
from app.config.file import Loaded
from app.config.settings import Settings
from app.demo.prompts import prompts
from app.engines import registry
from app.engines.base import Sequence as Tokens
from app.engines.catalog import load_catalog
from app.errors import GristmillError
from app.jobs import JobState, Kind
from app.local.supervisor import System
from app.requests import bodies
from app.requests.prepare import prepare
from app.store import reads
from app.store.database import Database
from app.store.reads import JobView
from gristmill_client import AsyncClient, Client

SAMPLE: Final = 6
"""Prompts that are also sent one at a time, each after the answer to the one before."""
ENOUGH_S: Final = 60.0
"""After so long no further one is begun by `generate` alone."""
TIMEOUT_S: Final = 300.0
WIDTH: Final = 165
"""Columns of the tables where the output is no terminal."""

Bodies = Sequence[dict[str, Any]]


# ── every way of producing: bodies in, job ids out ──────────────────────────────────────────────

_FOREIGN_SERVICE: Final = """
import json, sys
from celery import Celery

given = json.load(sys.stdin)
app = Celery(broker=given["broker"])
for body in given["bodies"]:
    task = "inference.embed" if "input" in body else "inference.generate"
    hidden = {"argsrepr": "()", "kwargsrepr": "{}"}  # else Celery copies the prompt into a header
    print(app.send_task(task, kwargs=body, **hidden).id)
"""


def by_celery(settings: Settings, given: Bodies) -> list[str]:
    """A service's own Celery app, in a process that does not import this package."""
    done = subprocess.run(
        [sys.executable, "-c", _FOREIGN_SERVICE],
        input=json.dumps({"broker": settings.broker.url, "bodies": given}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise GristmillError(f"The Celery service failed:\n{done.stderr.strip()}")
    return done.stdout.split()


def _http(settings: Settings) -> httpx.Client:
    key = settings.api.key
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=settings.api.url, headers=headers, trust_env=False)


def by_http(settings: Settings, given: Bodies) -> list[str]:
    with _http(settings) as http:
        answers = [http.post("/v1/jobs", json={"body": body}) for body in given]
    return [answer.raise_for_status().json()["id"] for answer in answers]


def by_http_bulk(settings: Settings, given: Bodies) -> list[str]:
    with _http(settings) as http:
        answer = http.post("/v1/jobs/bulk", json={"jobs": [{"body": body} for body in given]})
    return [item["id"] for item in answer.raise_for_status().json()["items"]]


def by_client(settings: Settings, given: Bodies) -> list[str]:
    with Client(settings.api.url, key=settings.api.key) as client:
        return [client.submit(body) for body in given]


def by_async_client(settings: Settings, given: Bodies) -> list[str]:
    async def submit() -> list[str]:
        async with AsyncClient(settings.api.url, key=settings.api.key) as client:
            return list(await asyncio.gather(*(client.submit(body) for body in given)))

    return asyncio.run(submit())


def by_raw_redis(settings: Settings, given: Bodies) -> list[str]:
    """Nothing but LPUSH, as from any language."""
    queue, ids = settings.broker.default_queue, [str(uuid4()) for _ in given]
    key = Layout.of(settings).key(queue)
    with connected(settings) as client:
        for job_id, body in zip(ids, given, strict=True):
            kind = Kind.EMBED if "input" in body else Kind.GENERATE
            client.lpush(key, raw_message(job_id, kind, body, queue=queue))
    return ids


WAYS: Final[dict[str, Callable[[Settings, Bodies], list[str]]]] = {
    "own Celery app": by_celery,
    "HTTP": by_http,
    "HTTP, bulk": by_http_bulk,
    "client": by_client,
    "async client": by_async_client,
    "raw Redis": by_raw_redis,
}


# ── the demo ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Sent:
    way: str
    body: dict[str, Any]
    job_id: str


def run(loaded: Loaded, out: Console, tell: Callable[[str], None]) -> None:
    """Start everything, run the prompts, print what came of them, stop everything.

    Raises `GristmillError` if a job did not complete.
    """
    if not out.is_terminal:
        out.width = WIDTH
    with (
        System(loaded, tell) as system,
        closing(Database(system.settings.database.url)) as database,
    ):
        sent = _produce(system.settings)
        out.print(f"{len(sent)} prompts are on their way, by {len(WAYS)} ways.")
        jobs = _follow(database, sent, system, out)
        alone = _one_at_a_time(system.settings, sent, database, out)
        plain = _plain_tokens_per_s(system.settings, sent, out)
        out.print(_table(sent, jobs))
        _print_answers(sent, jobs, out)
        out.print(_summary(jobs, alone, plain))
        settings = system.settings
        out.print(f"API      {settings.api.url}/docs\nFlower   {settings.flower.url}")
        out.print("Both stop now; `make up` keeps them running.")
    failed = [job for job in jobs if job.state is not JobState.COMPLETED]
    if failed:
        raise GristmillError(f"{len(failed)} of {len(jobs)} jobs did not complete.")


def _produce(settings: Settings) -> list[Sent]:
    """Share the prompts out over the ways, so that each way sends every kind."""
    asked = prompts()
    sent = []
    for place, (way, send) in enumerate(WAYS.items()):
        given = asked[place :: len(WAYS)]
        ids = send(settings, given)
        sent += [Sent(way, body, job_id) for body, job_id in zip(given, ids, strict=True)]
    return sent


def _follow(
    database: Database, sent: Sequence[Sent], system: System, out: Console
) -> list[JobView]:
    """Show how many are queued, running and done until all have ended; returns their records."""
    ids = [UUID(each.job_id) for each in sent]
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    deadline = time.monotonic() + TIMEOUT_S
    with Progress(*columns, console=out) as progress:
        bar = progress.add_task("", total=len(ids))
        while not progress.finished:
            if time.monotonic() > deadline:
                raise GristmillError(f"Not all jobs ended within {TIMEOUT_S:g} s.")
            system.look()
            with database.begin() as connection:
                told = reads.states(connection, ids).values()
            states = Counter(state for state in told if isinstance(state, JobState))
            num_done = sum(count for state, count in states.items() if state.is_final)
            text = "  ".join(f"{state} {count}" for state, count in sorted(states.items()))
            progress.update(bar, completed=num_done, description=text)
            time.sleep(0.2)
    return _records(database, ids)


def _records(database: Database, ids: Sequence[UUID]) -> list[JobView]:
    with database.begin() as connection:
        found = reads.find(connection, ids)
    return [each for each in found if isinstance(each, JobView)]


def _one_at_a_time(
    settings: Settings, sent: Sequence[Sent], database: Database, out: Console
) -> list[JobView]:
    """The records of a sample sent again, each prompt after the answer to the one before."""
    sample = _sample(sent)
    out.print(f"For comparison, {len(sample)} of them again, one at a time.")
    ids = []
    with Client(settings.api.url, key=settings.api.key) as client:
        for body in sample:
            ids.append(client.submit(body))
            client.wait(ids[-1], TIMEOUT_S)
    return _records(database, [UUID(job_id) for job_id in ids])


def _sample(sent: Sequence[Sent]) -> Bodies:
    return [each.body for each in sent if "input" not in each.body][:SAMPLE]


def _plain_tokens_per_s(settings: Settings, sent: Sequence[Sent], out: Console) -> float:
    """Output tokens per second of transformers' `generate`, one prompt at a time and no queue."""
    out.print("And with transformers' generate alone, without a queue.")
    name = settings.model_name(Kind.GENERATE, None)
    model = load_catalog(settings, [name])[name]
    engine = registry.create(
        "generate",
        model.folder,
        model.settings.model_copy(update={"options": {}}),
        device=settings.worker.device,
        threads=settings.worker.threads,
        progress=lambda: None,
    )
    tokens, seconds = 0, 0.0
    for place, body in enumerate(_sample(sent)):
        request = bodies.parse(body)
        prepared = prepare(request, model.tokenizer, model.settings)
        began = time.monotonic()
        engine.admit("plain", [Tokens(place, prepared.prompts[0], prepared.sampling())])
        while engine.has_work:
            tokens += sum(len(each.token_ids) for each in engine.step())
        seconds += time.monotonic() - began
        if seconds > ENOUGH_S:
            break
    engine.close()
    return tokens / seconds


# ── what came of it ─────────────────────────────────────────────────────────────────────────────


def _table(sent: Sequence[Sent], jobs: Sequence[JobView]) -> Table:
    table = Table(title="Each job's record in Postgres; times in ms", header_style="bold")
    for name in ("job", "way", "model", "state", "batch"):
        table.add_column(name, no_wrap=True)
    for name in ("size", "closed by", "in", "out", "queue", "batch wait", "inference", "total"):
        table.add_column(name, justify="right")
    table.add_column("cost", justify="right", no_wrap=True)
    for each, job in zip(sent, jobs, strict=True):
        result, batch = job.result, job.batch
        cells = [_short(job.id), each.way, job.model, job.state.value]
        cells += (
            [_short(batch.id), str(batch.num_sequences), batch.close_reason] if batch else 3 * [""]
        )
        if result:
            cells += [str(result.input_tokens), str(result.output_tokens)]
            times = (result.queue_ms, result.batch_wait_ms, result.inference_ms, result.total_ms)
            cells += [f"{ms:.0f}" if ms is not None else "" for ms in times]
            cells.append(f"{result.cost or 0:.9f} {result.currency or ''}")
        table.add_row(*cells)
    return table


def _short(id: UUID) -> str:
    """Its end: most ids begin with the time."""
    return str(id)[-8:]


def _print_answers(sent: Sequence[Sent], jobs: Sequence[JobView], out: Console) -> None:
    out.print("\n[bold]A few of the answers[/]", markup=True)
    shown: set[str] = set()
    for each, job in zip(sent, jobs, strict=True):
        if each.way in shown or not (job.result and job.result.response):
            continue
        shown.add(each.way)
        for question, answer in _exchange(each.body, job.result.response):
            out.print(f"  {question!r}\n    → {answer!r}", soft_wrap=True)


def _exchange(body: dict[str, Any], response: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "messages" in body:
        yield body["messages"][-1]["content"], response["choices"][0]["message"]["content"]
    elif "prompt" in body:
        yield body["prompt"], response["choices"][0]["text"]
    else:
        vector = response["data"][0]["embedding"]
        yield (
            body["input"],
            f"{len(vector)} numbers: {', '.join(f'{x:.3f}' for x in vector[:4])}, …",
        )


def _summary(jobs: Sequence[JobView], alone: Sequence[JobView], plain: float) -> Table:
    table = Table(
        show_header=False, box=None, pad_edge=False, title="Summary", title_justify="left"
    )
    table.add_column(style="bold")
    results = [job.result for job in jobs if job.result]
    batches = {job.batch.id: job.batch for job in jobs if job.batch}
    closed = Counter(batch.close_reason for batch in batches.values())
    mean_size = sum(batch.num_sequences for batch in batches.values()) / max(len(batches), 1)
    table.add_row("jobs", _counts(Counter(job.state.value for job in jobs)))
    table.add_row("batches", f"{_counts(closed)}; {mean_size:.1f} sequences on average")
    cost = sum(result.cost or 0 for result in results)
    num_tokens = sum((result.input_tokens or 0) + (result.output_tokens or 0) for result in results)
    currency = next((result.currency for result in results if result.currency), "")
    table.add_row("cost", f"{cost:.6f} {currency}, at the price of configs/prices.toml")
    table.add_row(
        "per million tokens",
        f"{cost / max(num_tokens, 1) * 10**6:.3f} {currency}, prompt and output",
    )
    together, one = _tokens_per_s(jobs), _tokens_per_s(alone)
    table.add_row(
        "output tokens/s", f"{together:.1f}, from the first prompt in to the last answer out"
    )
    table.add_row("one at a time", f"{one:.1f} on {len(alone)} of the prompts, the same way")
    table.add_row("generate alone", f"{plain:.1f} on the same, in turn, without a queue")
    speed_up = f"{together / plain:.1f}× of generate alone, {together / one:.1f}× of one at a time"
    table.add_row("speed-up", speed_up if one and plain else "")
    return table


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())


def _tokens_per_s(jobs: Sequence[JobView]) -> float:
    """Output tokens over the time from the first submission to the last finish, by the database."""
    generated = [(job, job.result) for job in jobs if job.result and job.result.output_tokens]
    if not generated:
        return 0.0
    start = min(job.created_at for job, _ in generated)
    end = max(result.finished_at for _, result in generated)
    return sum(result.output_tokens or 0 for _, result in generated) / (end - start).total_seconds()
