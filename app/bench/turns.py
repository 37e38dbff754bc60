"""Who waits for whom in a worker: an engine for its next batch, a model for another, patient jobs.

A worker has two models with stub engines whose batches take a fixed time. While one has a backlog
that is endless for the time of the measurement,

    pause     is what its engine stands still for between two full batches;
    idle      is what a lone job of the other model takes, from its submission to its result;
    patient   is what a lone job of the last priority waits for in the same queue, in time and in
              batches that begin before it: every sixteenth message that a worker takes is of these,
              and sixteen full batches at most pass over one that it holds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence as Seq
from contextlib import closing
from itertools import pairwise
from statistics import median, quantiles
from typing import Any, Final

import psycopg

from app.bench.outcomes import good
from app.bench.own_system import UNBOUNDED, OwnSystem, eventually, model_entry
from app.bench.report import machine, print_json, print_table
from app.jobs import MAX_PRIORITY
from gristmill_client import Client, Submission

BODY: Final = {"prompt": "x", "max_tokens": 1}
ROWS: Final = 64
WARM_UP: Final = 8 * ROWS
PAUSES: Final = 30 * ROWS
TIMEOUT_S: Final = 60.0

# When each full batch ran; stamps are the worker's, which counts them from one clock.
_RUNS: Final = """
    SELECT min(started_at), max(started_at + inference_ms * interval '1 ms') FROM results
    WHERE model = 'busy' GROUP BY batch_id HAVING count(*) = %s ORDER BY 1
"""
_BEFORE: Final = """
    SELECT count(DISTINCT other.batch_id) FROM results AS other, results AS lone
    WHERE lone.job_id = %s AND other.model = 'busy' AND other.priority = 0
        AND other.started_at BETWEEN lone.created_at AND lone.started_at
"""


class Mill:
    """The running system: submits, and reads what became of jobs."""

    def __init__(self, system: OwnSystem) -> None:
        settings = system.settings
        self._rows = psycopg.connect(settings.database.url, autocommit=True)
        self._client = Client(settings.api.url, key=settings.api.key)

    def close(self) -> None:
        self._client.close()
        self._rows.close()

    def submit(self, number: int, model: str = "busy", priority: int = 0) -> None:
        job: Submission = {"body": {"model": model, **BODY}, "priority": priority}
        for answer in self._client.submit_many([job] * number):
            good(answer)

    def lone(self, model: str, priority: int = 0) -> tuple[str, float]:
        """Its id, and milliseconds until its result was there."""
        began = time.monotonic()
        job_id = self._client.submit({"model": model, **BODY}, priority=priority)
        self._client.wait(job_id, timeout_s=TIMEOUT_S)
        return job_id, (time.monotonic() - began) * 1000

    def drain(self) -> None:
        eventually(lambda: self.queued() == 0, TIMEOUT_S)

    def queued(self) -> int:
        return int(self._one("SELECT count(*) FROM open_jobs"))

    def pauses_ms(self) -> list[float]:
        runs = self._rows.execute(_RUNS, [ROWS]).fetchall()
        return [(after[0] - before[1]).total_seconds() * 1000 for before, after in pairwise(runs)]

    def batches_before(self, job_id: str) -> int:
        return int(self._one(_BEFORE, job_id))

    def _one(self, statement: Any, *given: object) -> Any:
        [value] = self._rows.execute(statement, given).fetchone() or (0,)
        return value


def main(arguments: Seq[str]) -> None:
    options = _parser().parse_args(arguments)
    stub = {"max_batch_size": ROWS, "max_wait_ms": 20, "options": {"step_ms": options.step_ms}}
    models = model_entry("busy", **stub) + model_entry("idle", default=False, **stub)
    with OwnSystem(UNBOUNDED, models) as system, closing(Mill(system)) as mill:
        for model in ("busy", "idle"):
            mill.submit(WARM_UP, model)
        mill.drain()
        mill.submit(PAUSES)
        mill.drain()
        pauses = mill.pauses_ms()[-PAUSES // ROWS + 2 :]
        mill.submit(options.jobs)
        idle = [mill.lone("idle")[1] for _ in range(options.lone)]
        patient, patient_ms = mill.lone("busy", MAX_PRIORITY)
        before = mill.batches_before(patient)
        left = mill.queued()
    _print(options, pauses, idle, (patient_ms, before), left)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench turns", description=__doc__)
    parser.add_argument("--jobs", type=int, default=40_000, help="of the backlog")
    parser.add_argument("--lone", type=int, default=5, help="lone jobs of the idle model")
    parser.add_argument("--step-ms", type=float, default=50.0, help="of a batch in an engine")
    return parser


def _print(
    options: argparse.Namespace,
    pauses: Seq[float],
    idle: Seq[float],
    patient: tuple[float, int],
    left: int,
) -> None:
    print(f"\n{machine()}\nbatches of {ROWS} that take {options.step_ms:g} ms; ", end="")
    print(f"{left:,} of {options.jobs:,} jobs were left at the end\n")
    print_table(
        ["", "median", "most"],
        [
            ["pause between full batches, ms", f"{median(pauses):.2f}", f"{max(pauses):.2f}"],
            ["a job of the idle model, ms", f"{median(idle):.0f}", f"{max(idle):.0f}"],
            ["a patient job, ms", "", f"{patient[0]:.0f}"],
            ["batches before it", "", f"{patient[1]}"],
        ],
    )
    print()
    print_json(
        "turns",
        {"pause_over_batch": round(median(pauses) / options.step_ms, 4)},
        pause_ms=round(median(pauses), 2),
        pause_p90_ms=round(quantiles(pauses, n=10)[-1], 2),
        idle_ms=[round(each) for each in idle],
        patient_ms=round(patient[0]),
        batches_before_patient=patient[1],
        left=left,
    )
