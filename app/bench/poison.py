"""What prompts that kill the engine process cost their mates: nothing, but for some runs.

Batches of 64 with 1, 2 and 5 of them, on the stub engine in real processes. The bound on the runs
is that of halving: from the whole batch down to each poison, both halves of every group that died.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from typing import Final

from app.bench.outcomes import good
from app.bench.own_system import OwnSystem, model_entry
from app.bench.report import print_json, print_table
from app.bench.system import Bench
from gristmill_client import Client, Job, JobState

BATCH: Final = 64


def max_runs(poisons: int, batch: int = BATCH) -> int:
    """Most engine runs to find the poisons in a batch of a power of two.

    1 + 2 × the groups that can die: at each level of the halving one for each poison, or all.
    For one poison that is 2 × log2(batch) + 1.
    """
    levels = (batch - 1).bit_length()
    return 1 + 2 * sum(min(1 << level, poisons) for level in range(levels))


def main(arguments: Seq[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m app.bench poison", description=__doc__)
    parser.add_argument("--poisons", type=int, nargs="+", default=[1, 2, 5])
    options = parser.parse_args(arguments)
    with ExitStack() as held:
        model = model_entry(
            max_batch_size=BATCH,
            max_batch_tokens=100_000,
            max_wait_ms=10_000,
            options={"step_ms": 1},
        )
        system = held.enter_context(OwnSystem("", model, print))
        bench = Bench(system, held.enter_context(Client(system.settings.api.url)))
        rows = [_run(bench, number) for number in options.poisons]
    columns = ["poisons among 64", "failed", "innocents failed", "mates charged", "runs", "bound"]
    print()
    print_table(columns, [[str(cell) for cell in row] for row in rows])
    print_json(
        "poison",
        {"runs_over_bound": round(max(row[4] / row[5] for row in rows), 3)},
        innocents_failed=sum(row[2] for row in rows),
        mates_charged=sum(row[3] for row in rows),
    )


def _run(bench: Bench, number: int) -> list[int]:
    """Poisons, failed poisons, failed innocents, mates charged for the crash, runs, bound."""
    places = {place * BATCH // number for place in range(number)}
    bodies = [{"prompt": "crash" if n in places else f"good {n}"} for n in range(BATCH)]
    before = bench.logged("suspects apart")
    ids = [*map(good, bench.client.submit_many({"body": body} for body in bodies))]
    jobs = bench.wait(lambda: bench.ended(ids))
    failed = {n for n, job in enumerate(jobs) if job.state is not JobState.COMPLETED}
    charged = [job for n, job in enumerate(jobs) if n not in places and _charged_twice(job)]
    batches = {job.raw["batch"]["id"] for job in jobs}
    runs = len(batches) + bench.logged("suspects apart") - before
    return [
        number,
        len(failed & places),
        len(failed - places),
        len(charged),
        runs,
        max_runs(number),
    ]


def _charged_twice(job: Job) -> bool:
    """Whether anything but the attempt that answered was charged."""
    return sum(bool(each["charged"]) for each in job.raw["attempts"]) > 1
