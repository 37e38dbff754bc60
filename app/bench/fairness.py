"""Fairness: what a lone job waits for while other tenants have a hundred thousand queued.

The whole system runs with a stub engine whose batches take a fixed time. Noisy tenants submit
first, the first of them what takes an hour. Then tenants that have nothing else submit a job each,
one after the other, at odd moments. Each is held to its bound:

    batches   those that are in the engine by then: the one that runs, and the one that lies ready
              where batches are short
    share     the job's own time on the device, as often as there are tenants: what it would take if
              it ran beside one job of each of them

At the end, in a system of their own, three tenants of different weights have more to do than there
is time, and their device time is compared with their weights. Submissions go through the intake
itself, as API processes use it, without HTTP.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence as Seq
from contextlib import closing
from dataclasses import dataclass
from statistics import median
from typing import Final

import psycopg

from app.bench.own_system import UNBOUNDED, OwnSystem, eventually, model_entry
from app.bench.report import machine, print_json, print_table
from app.broker.publisher import Publisher
from app.engines.catalog import load_catalog
from app.intake.decision import Decision
from app.intake.submit import Submitter
from app.store.database import Database

STEPS: Final = 2
BODY: Final = {"prompt": "x", "max_tokens": STEPS}
ROWS: Final = 8
READY_BELOW_MS: Final = 2_000
"""Shorter batches are claimed while the one before runs."""
PAGE: Final = 1_000
TIMEOUT_S: Final = 300.0
WEIGHTS: Final = {"weight-1": 1, "weight-2": 2, "weight-5": 5}

_ENDED: Final = """
    SELECT extract(epoch FROM started_at - created_at) * 1000, inference_ms
    FROM results WHERE job_id = %s AND state = 'completed'
"""
_LASTED: Final = "SELECT max(inference_ms) FROM results WHERE state = 'completed'"
_USED: Final = """
    SELECT tenant, sum(device_ns) FROM results WHERE tenant = ANY(%s) GROUP BY tenant
"""


@dataclass(frozen=True, slots=True)
class Waited:
    """What lone jobs waited for beside so many noisy tenants. In milliseconds."""

    tenants: int
    queued: int
    waits: list[float]
    batch: float

    @property
    def batches(self) -> float:
        return self.batch * (2 if self.batch < READY_BELOW_MS else 1)

    @property
    def share(self) -> float:
        return self.batch / ROWS * (self.tenants + 1)

    @property
    def over_bound(self) -> float:
        return max(self.waits) / (self.batches + self.share)


class Mill:
    """The running system, and a way in for any tenant."""

    def __init__(self, system: OwnSystem) -> None:
        settings = system.settings
        self.rows = psycopg.connect(settings.database.url, autocommit=True)
        self._database = Database(settings.database.url, application_name="gristmill bench")
        self._publisher = Publisher(settings)
        self._submitter = Submitter(
            settings, self._database, self._publisher, load_catalog(settings)
        )

    def close(self) -> None:
        self._publisher.close()
        self._database.close()
        self.rows.close()

    def submit(self, tenant: str, number: int) -> list[str]:
        ids: list[str] = []
        while len(ids) < number:
            page = min(PAGE, number - len(ids))
            jobs = [self._submitter.check({"body": BODY}, tenant=tenant) for _ in range(page)]
            stored = self._submitter.store(Decision(), jobs)
            self._submitter.send(stored)
            ids += [str(job.id) for job in stored.new_jobs]
        return ids

    def wait_ms(self, tenant: str) -> float:
        """What a job of this tenant waits for, from when it is accepted to when it begins."""
        [job_id] = self.submit(tenant, 1)
        row = eventually(lambda: self.rows.execute(_ENDED, [job_id]).fetchone(), TIMEOUT_S)
        return float(row[0])

    def batch_ms(self) -> float:
        row = eventually(lambda: self.rows.execute(_LASTED).fetchone(), TIMEOUT_S)
        return float(row[0])

    def queued(self) -> int:
        row = self.rows.execute("SELECT count(*) FROM open_jobs").fetchone()
        return int(row[0]) if row else 0

    def used(self, tenants: Seq[str]) -> dict[str, float]:
        return {
            tenant: float(ns) for tenant, ns in self.rows.execute(_USED, [list(tenants)]).fetchall()
        }


def main(arguments: Seq[str]) -> None:
    options = _parser().parse_args(arguments)
    stub = {"step_ms": options.batch_ms / STEPS}
    models = model_entry(max_batch_size=ROWS, max_wait_ms=20, options=stub)
    with OwnSystem(UNBOUNDED, models) as system, closing(Mill(system)) as mill:
        mill.submit("first", ROWS)
        eventually(lambda: mill.queued() == 0, TIMEOUT_S)
        waited = []
        for number in options.tenants:
            _make_noise(mill, number, options.jobs)
            waited.append(_measure(mill, number, options.lone))
            print(f"{number} noisy: {waited[-1].waits}", flush=True)
    shares = _shares(models, options.seconds, options.batch_ms) if options.seconds else {}
    print(f"\n{machine()}\n")
    _print_waited(waited)
    print()
    due = {tenant: weight / sum(WEIGHTS.values()) for tenant, weight in WEIGHTS.items()}
    print_table(
        ["tenant", "share due", "share of device time"],
        [[tenant, f"{due[tenant]:.3f}", f"{share:.3f}"] for tenant, share in shares.items()],
    )
    ratios = {
        "wait_over_bound": {str(each.tenants): round(each.over_bound, 3) for each in waited},
        "share_over_due": {
            tenant: round(share / due[tenant], 3) for tenant, share in shares.items()
        },
    }
    print()
    print_json("fairness", ratios, jobs=options.jobs, batch_ms=options.batch_ms)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench fairness", description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000, help="of the first noisy tenant")
    parser.add_argument("--tenants", type=int, nargs="+", default=[1, 10, 100], help="noisy ones")
    parser.add_argument("--lone", type=int, default=5, help="lone jobs beside each")
    parser.add_argument("--batch-ms", type=float, default=200.0, help="of the stub engine")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="to compare weights in; 0: not at all"
    )
    return parser


def _make_noise(mill: Mill, tenants: int, jobs: int) -> None:
    """The first has all the jobs, each further one a five-hundredth of them."""
    known = {
        tenant
        for (tenant,) in mill.rows.execute("SELECT DISTINCT tenant FROM open_jobs").fetchall()
    }
    for number in range(tenants):
        if (tenant := f"noisy-{number}") not in known:
            mill.submit(tenant, jobs if number == 0 else jobs // 500)


def _measure(mill: Mill, tenants: int, number: int) -> Waited:
    queued, chance, waits = mill.queued(), random.Random(tenants), []
    for place in range(number):
        time.sleep(chance.uniform(0.0, 2 * mill.batch_ms() / 1000))
        waits.append(mill.wait_ms(f"lone-{tenants}-{place}"))
    return Waited(tenants, queued, waits, mill.batch_ms())


def _shares(models: str, seconds: float, batch_ms: float) -> dict[str, float]:
    """What part of their device time each of the weighed tenants has had."""
    with OwnSystem(UNBOUNDED, models) as system, closing(Mill(system)) as mill:
        return _shared(mill, seconds, batch_ms)


def _shared(mill: Mill, seconds: float, batch_ms: float) -> dict[str, float]:
    for tenant, weight in WEIGHTS.items():
        mill.rows.execute(
            "INSERT INTO tenants (name, weight) VALUES (%s, %s)"
            " ON CONFLICT (name) DO UPDATE SET weight = excluded.weight",
            [tenant, weight],
        )
    time.sleep(2.0)  # rescue tells the workers' queue
    for tenant in WEIGHTS:
        mill.submit(tenant, int(ROWS * 1000 * seconds / batch_ms))
    time.sleep(seconds)
    used = mill.used(list(WEIGHTS))
    return {tenant: used.get(tenant, 0.0) / sum(used.values()) for tenant in WEIGHTS}


def _print_waited(waited: Seq[Waited]) -> None:
    columns = ["noisy tenants", "queued", "wait, ms", "most", "batches", "share", "bound"]
    print_table(
        [*columns, "most / bound"],
        [
            [
                str(each.tenants),
                f"{each.queued:,}",
                f"{median(each.waits):.0f}",
                f"{max(each.waits):.0f}",
                f"{each.batches:.0f}",
                f"{each.share:.0f}",
                f"{each.batches + each.share:.0f}",
                f"{each.over_bound:.2f}",
            ]
            for each in waited
        ],
    )
