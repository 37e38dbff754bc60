"""No plan depends on what the planner believes of a queue.

Statistics are taken while the table is empty, or never; then ten thousand jobs come at once. Each
statement of a group is explained as it runs: it touches each row that it is for a few times, and
reads a table through once at the most, but never once for each of its rows.
"""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from sqlalchemy import Connection, event, text

from app.jobs import AttemptOutcome
from app.local.ports import free_port
from app.local.servers import EmbeddedPostgres
from app.store import cancellation, claims, delivery, purging, reads, releases, submissions, sweeps
from app.store.claims import Member
from app.store.database import Database
from app.store.lists import Filter
from app.store.migration import migrate
from app.store.submissions import Incoming, NewJob
from tests.rows import Worker, completed, end_lease, new_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NUM_JOBS = 10_000
GROUP = 500
PARTITIONS = ("requests_default", "attempts_default", "results_default")
DEBIAN_15 = Path("/usr/lib/postgresql/15/bin")

STATES = {
    "never analysed": (),
    "vacuumed while empty": ("VACUUM ANALYZE",),
    "analysed with ended jobs, vacuumed while empty": (
        """
        INSERT INTO results (
            job_id, model, kind, source, state, not_before, created_at, queued_at, finished_at,
            total_ms
        )
        SELECT gen_random_uuid(), 'm', 'generate', 'api', 'completed', now(), now(), now(), now(), 1
        FROM generate_series(1, 5000)
        """,
        "VACUUM ANALYZE",
        "DELETE FROM results",
        "VACUUM",
    ),
}


@contextmanager
def postgres_15(folder: Path) -> Iterator[str]:
    """The URL of a Debian server, which does not run as root."""
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    port, data = free_port(), folder / "data"

    def run(program: str, *options: str) -> None:
        postgres = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        user = postgres if os.geteuid() == 0 else []
        command = [*user, str(DEBIAN_15 / program), "-D", str(data), *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")

    run("initdb", "--auth=trust", "--username=postgres", "--no-sync")
    run("pg_ctl", "-w", "-l", str(folder / "log"), "-o", f"-p {port} -k {folder} -F", "start")
    try:
        yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
    finally:
        run("pg_ctl", "-m", "immediate", "stop")


@pytest.fixture(scope="module", params=["18", "15"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The URL of a server of each version."""
    if request.param == "15":
        if not DEBIAN_15.exists():
            pytest.skip("no Postgres 15 is installed")
        with postgres_15(Path("/tmp") / f"pg15-{secrets.token_hex(4)}") as url:
            yield url
    else:
        embedded: EmbeddedPostgres = request.getfixturevalue("postgres_server")
        yield embedded.url


@pytest.fixture(params=list(STATES))
def stale(server: str, request: pytest.FixtureRequest) -> Iterator[Database]:
    """A database whose statistics say that there are no jobs, with ten thousand of them."""
    name = f"stale_{secrets.token_hex(4)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    url = f"{server.rpartition('/')[0]}/{name}"
    migrate(url)
    with psycopg.connect(url, autocommit=True) as connection:
        for table in ("job_keys", "open_jobs", "batches", *PARTITIONS):
            connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
        for statement in STATES[request.param]:
            connection.execute(statement)
    with closing(Database(url, statement_timeout_ms=60_000)) as database:
        yield database
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def rows_read(plan: dict[str, Any]) -> float:
    """Rows that the scans of a plan looked at."""
    removed = plan.get("Rows Removed by Filter", 0) + plan.get("Rows Removed by Join Filter", 0)
    own = (plan["Actual Rows"] + removed) * plan["Actual Loops"]
    return (own if "Scan" in plan["Node Type"] or removed else 0) + sum(
        map(rows_read, plan.get("Plans", ()))
    )


@contextmanager
def bounded(connection: Connection) -> Iterator[None]:
    """Explain each statement as it runs; fail if it reads more than a few times what is there."""

    def before(conn: Connection, cursor: Any, statement: str, parameters: Any, *_: object) -> None:
        cursor.execute("SAVEPOINT explained")
        cursor.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters)
        read = rows_read(cursor.fetchone()[0][0]["Plan"])
        cursor.execute("ROLLBACK TO explained")
        assert read < 6 * NUM_JOBS, f"{read:.0f} rows were read by: {statement[:120]}"

    event.listen(connection, "before_cursor_execute", before)
    yield
    event.remove(connection, "before_cursor_execute", before)


def test_statements_for_a_group_read_each_row_a_few_times(stale: Database) -> None:
    jobs = [new_job(metadata={"customer": str(n % 99)}) for n in range(NUM_JOBS)]
    ids = [job.id for job in jobs]
    with stale.begin() as connection:
        submissions.insert_jobs(connection, jobs, sent=ids)
    worker = Worker.registered(stale)
    group, others = ids[:GROUP], ids[GROUP : 2 * GROUP]
    for step in _steps(worker, group, others):
        with stale.begin() as connection, bounded(connection):
            step(connection)


def test_plans_that_a_worker_made_on_empty_tables_read_each_row_a_few_times_when_they_are_full(
    server: str, stale: Database
) -> None:
    with stale.begin() as connection:
        name = connection.scalar(text("SELECT current_database()"))
    url = f"{server.rpartition('/')[0]}/{name}"
    with closing(Database(url, pool_size=1, looks_up_only=True)) as database:
        worker = Worker.registered(database)
        for _ in range(10):  # the driver prepares what it has sent a few times
            _run(worker, [new_job()])
        before = _read(database)
        jobs = [new_job() for _ in range(NUM_JOBS)]
        with stale.begin() as connection:
            submissions.insert_jobs(connection, jobs, sent=[job.id for job in jobs])

        _run(worker, jobs[:GROUP])

        assert _read(database) - before < 20 * GROUP + NUM_JOBS


def _run(worker: Worker, jobs: list[NewJob]) -> None:
    """The life of jobs, from the first message on."""
    arrivals = [Incoming(job.id, job) for job in jobs]
    with worker.database.autocommit() as connection:
        submissions.receive(connection, worker.id, arrivals)
    members = [Member(job.id, uuid4()) for job in jobs]
    with worker.database.autocommit() as connection:
        claimed = claims.claim(connection, worker.batch(), members)
    assert len(claimed) == len(jobs)
    with worker.database.autocommit() as connection:
        assert len(claims.finish(connection, [completed(each) for each in claimed])) == len(jobs)


def _read(database: Database) -> int:
    """Rows of all tables that scans have looked at."""
    with database.autocommit() as connection:
        connection.execute(text("SELECT pg_stat_force_next_flush()"))
        read = "SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0)) FROM pg_stat_user_tables"
        return int(connection.execute(text(read)).scalar_one())


def _steps(
    worker: Worker, group: list[UUID], others: list[UUID]
) -> Iterator[Callable[[Connection], object]]:
    """The life of a group of jobs, and what rescue does for it."""
    yield lambda c: delivery.not_sent(c, others)
    yield lambda c: delivery.send_due(c, new_job().model, range(10), GROUP)
    yield lambda c: delivery.overdue(c, 0.0, GROUP)
    yield lambda c: delivery.send_again(c, others, 0.0)
    yield lambda c: submissions.receive(c, worker.id, [*map(Incoming, group)])
    yield lambda c: delivery.let_go(c, worker.id, group[:100])
    yield lambda c: delivery.free_forgotten(c, worker.id, group)
    claimed: list[claims.Claimed] = []
    members = [Member(job_id, uuid4()) for job_id in group]
    batch = worker.batch()
    yield lambda c: claims.take(c, worker.batch(), [Member(each, uuid4()) for each in group])
    yield lambda c: claims.claim(c, batch, members)
    with worker.database.begin() as connection:
        claimed = claims.claim(connection, batch, members)
    half = len(claimed) // 2
    yield lambda c: claims.finish(c, [completed(each) for each in claimed[:half]])
    yield lambda c: releases.release(
        c,
        [
            releases.Release(
                job_id=each.job_id,
                attempt_id=each.attempt_id,
                created_at=each.created_at,
                outcome=AttemptOutcome.RELEASED,
                charged=False,
            )
            for each in claimed[half : half + 50]
        ],
    )
    end_lease(worker.database, worker.id)
    yield lambda c: sweeps.expire_leases(c, sweeps.find_lost(c, GROUP))
    yield lambda c: delivery.free_lost(c, GROUP)
    with worker.database.begin() as connection:
        connection.execute(text("UPDATE open_jobs SET deadline = now() WHERE state = 'queued'"))
    yield lambda c: sweeps.expire_deadlines(c, sweeps.find_late(c, GROUP))
    yield lambda c: reads.states(c, group)
    yield lambda c: reads.list_jobs(c, Filter(metadata={"customer": "7"}), limit=100)
    yield lambda c: cancellation.cancel_free(c, group)
    yield lambda c: purging.purge(c, group[0])
