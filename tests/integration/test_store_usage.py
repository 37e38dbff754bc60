"""What ended jobs used is summed once for each of them, whatever happens, and stays."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from app.books.energy import EnergyMethod
from app.books.usage import PARTS, Filling, Question
from app.errors import JobNotFound, RequestError, Unavailable
from app.jobs import FINAL_STATES, JobState, Kind
from app.store import claims, months, purging, retention, sizes, submissions, sweeps, usage, windows
from app.store.claims import BatchStats
from app.store.database import Database
from app.store.submissions import RejectedJob
from app.store.tables import usage_sums
from app.store.windows import Window
from tests.integration.test_store_invariants import RandomLife
from tests.rows import Worker, at_once, completed, insert, new_job

USED_BY, SUMS = usage_sums.by, usage_sums.sums
OF_RESULTS = f"""
    SELECT job_id, date_trunc('hour', finished_at, 'UTC') AS hour, tenant, model, priority,
        price_id, currency,
        {", ".join(f"CAST(state = '{s}' AS int) AS jobs_{s}" for s in sorted(FINAL_STATES))},
        CAST(batch_size IS NOT NULL AS int) AS jobs_ran, coalesce(batch_size, 0) AS batch_jobs,
        coalesce(input_tokens, 0) AS input_tokens, coalesce(cached_tokens, 0) AS cached_tokens,
        coalesce(output_tokens, 0) AS output_tokens, device_ns, wasted_ns,
        coalesce(cost, 0) AS cost,
        coalesce(upstream_cost, 0) AS upstream_cost, coalesce(charge, 0) AS charge,
        CAST(energy_method IS NOT DISTINCT FROM 'measured' AS int) AS jobs_measured,
        CAST(energy_method IS NOT DISTINCT FROM 'estimated' AS int) AS jobs_estimated,
        coalesce(energy_nj, 0) AS energy_nj, coalesce(wasted_nj, 0) AS wasted_nj,
        coalesce(carbon_ug, 0) AS carbon_ug
    FROM results
"""
Sums = dict[tuple[Any, ...], Counter[str]]
EVER = (datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC))


class Ledger:
    """Every result that was ever seen, and what they come to."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._seen: dict[UUID, Any] = {}

    def look(self) -> None:
        with self._database.begin() as connection:
            for row in connection.execute(text(OF_RESULTS)).mappings():
                self._seen.setdefault(row["job_id"], row)

    @property
    def sums(self) -> Sums:
        return summed(self._seen.values())


def summed(rows: Any) -> Sums:
    found: Sums = {}
    for row in rows:
        sums = found.setdefault(tuple(row[name] for name in USED_BY), Counter())
        sums.update({name: row[name] for name in SUMS})
    return found


def told(database: Database, table: str = "usage") -> Sums:
    with database.begin() as connection:
        return summed(connection.execute(text(f"TABLE {table}")).mappings().all())


def batch_sums_of(database: Database, table: str | None = None) -> list[Any]:
    """What a table of sums has, or what the batches themselves come to."""
    of_batches = """
        SELECT date_trunc('hour', claimed_at, 'UTC') AS hour, model, 1 AS batches,
            num_jobs AS jobs, num_sequences AS sequences, useful_tokens, padded_tokens
        FROM batches WHERE finished_at IS NOT NULL
    """
    query = f"""
        SELECT hour, model, sum(batches), sum(jobs), sum(sequences), sum(useful_tokens),
            sum(padded_tokens)
        FROM ({of_batches if table is None else f"TABLE {table}"}) AS each
        GROUP BY hour, model ORDER BY hour, model
    """
    with database.begin() as connection:
        return [tuple(row) for row in connection.execute(text(query))]


def fold(database: Database, page: int = 1_000) -> int:
    with database.begin() as connection:
        return usage.fold(connection, page)


def ask(database: Database, **given: Any) -> list[Any]:
    since, until = EVER
    question = Question(**{"since": since, "until": until} | given)
    with database.begin() as connection:
        return usage.ask(connection, question).rows


def ended(database: Database, number: int = 1, finish: Any = None, **job: Any) -> list[UUID]:
    """Jobs that ran and ended just now."""
    ids = insert(database, *(new_job(**job) for _ in range(number)))
    worker = Worker.registered(database)
    given = {
        "input_tokens": 10, "cached_tokens": 4, "output_tokens": 5, "batch_size": number,
        "device_ns": 3_000, "price": Decimal("3.6"), "currency": "EUR", "price_id": "cpu",
        "cost": Decimal("0.000000003"), "energy_method": EnergyMethod.MEASURED, "energy_nj": 2_000,
        "wasted_nj": 0, "energy_boundary": "gpu", "carbon_ug": 7,
    } | (finish or {})  # fmt: skip
    worker.finish(*(completed(each, **given) for each in worker.claim(ids)))
    return ids


def end_at(database: Database, ids: list[UUID], stamp: datetime) -> None:
    """Let jobs have ended then: their results are written anew."""
    with database.begin() as connection:
        months.make(connection, "results", months.Month.of(stamp))
        connection.execute(
            text(
                "CREATE TEMP TABLE moved ON COMMIT DROP AS SELECT * FROM results"
                " WHERE job_id = ANY(:ids)"
            ),
            {"ids": ids},
        )
        connection.execute(text("DELETE FROM results WHERE job_id = ANY(:ids)"), {"ids": ids})
        connection.execute(
            text("UPDATE moved SET finished_at = :stamp, created_at = :stamp"), {"stamp": stamp}
        )
        connection.execute(text("TRUNCATE usage_deltas, usage_hours"))
        connection.execute(text("INSERT INTO results SELECT * FROM moved"))


# ── each ended job once ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_to_jobs_each_that_ended_is_summed_once(
    database: Database, seed: int
) -> None:
    chance = random.Random(seed)
    life, ledger = RandomLife(database, seed), Ledger(database)

    for _ in range(120):
        with suppress(JobNotFound):
            life.happen()
        ledger.look()
        match chance.randrange(8):
            case 0:
                fold(database, chance.choice([1, 2, 1_000]))
            case 1:
                with suppress(RuntimeError), database.begin() as connection:
                    usage.fold(connection, 1_000)
                    raise RuntimeError("killed before its commit")
            case 2:
                with suppress(JobNotFound), database.begin() as connection:
                    purging.purge(connection, chance.choice(life.ids))
                ledger.look()
            case 3:
                with database.begin() as connection:
                    retention.delete_jobs(connection, 0.0, 2)
        assert told(database) == ledger.sums

    while fold(database):
        pass
    assert told(database, "usage_hours") == ledger.sums
    assert told(database, "usage_deltas") == {}
    assert batch_sums_of(database, "batch_usage_hours") == batch_sums_of(database)


def test_workers_that_finish_at_once_and_sweepers_that_add_up_at_once_lose_and_double_nothing(
    database: Database,
) -> None:
    ledger, workers = Ledger(database), [Worker.registered(database) for _ in range(4)]
    claimed = [
        worker.claim(insert(database, *(new_job(priority=n % 3) for n in range(60))))
        for worker in workers
    ]

    def finish(worker: Worker, grants: list[Any]) -> int:
        for start in range(0, len(grants), 4):
            worker.finish(*(completed(each, batch_size=4) for each in grants[start : start + 4]))
        return 0

    def sweep() -> int:
        return sum(fold(database, 3) for _ in range(25))

    at_once(
        *(lambda w=w, c=c: finish(w, c) for w, c in zip(workers, claimed, strict=True)),
        sweep, sweep, sweep,
    )  # fmt: skip

    ledger.look()
    assert told(database) == ledger.sums
    while fold(database):
        pass
    assert told(database, "usage_hours") == ledger.sums
    assert sum(sums["jobs_completed"] for sums in ledger.sums.values()) == 240


def test_what_commits_late_is_not_missed_by_a_sweep_that_came_before(database: Database) -> None:
    worker = Worker.registered(database)
    [slow, quick] = worker.claim(insert(database, new_job(), new_job()))

    with database.begin() as late:
        claims.finish(late, [completed(slow)])
        worker.finish(completed(quick))
        assert fold(database) == 1
        assert [row.jobs[JobState.COMPLETED] for row in ask(database)] == [1]

    assert [row.jobs[JobState.COMPLETED] for row in ask(database)] == [2]
    assert fold(database) == 1


def test_a_sweeper_that_is_killed_before_its_commit_has_added_nothing(database: Database) -> None:
    ledger = Ledger(database)
    ended(database, 3)
    ledger.look()

    def fold_and_die() -> None:
        with database.begin() as doomed:
            assert usage.fold(doomed, 1_000) == 1
            pid = doomed.scalar(text("SELECT pg_backend_pid()"))
            with database.begin() as other:
                other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})

    with pytest.raises(Unavailable):
        fold_and_die()

    assert told(database) == told(database, "usage_deltas") == ledger.sums
    assert fold(database) == 1
    assert told(database) == told(database, "usage_hours") == ledger.sums


def test_a_finish_that_is_undone_or_repeated_is_summed_as_its_result_is(database: Database) -> None:
    worker = Worker.registered(database)
    [grant] = worker.claim(insert(database, new_job()))
    with suppress(RuntimeError), database.begin() as connection:
        claims.finish(connection, [completed(grant)])
        raise RuntimeError("the commit fails")
    assert ask(database) == []

    worker.finish(completed(grant))
    worker.finish(completed(grant))

    assert [row.jobs[JobState.COMPLETED] for row in ask(database)] == [1]


def test_jobs_that_never_ran_are_summed_too_and_with_a_currency_of_their_group(
    database: Database,
) -> None:
    with database.begin() as connection:
        refused = RejectedJob(
            id=uuid4(), kind=Kind.GENERATE, error_code="no", error_message="No.", model="smollm2"
        )
        submissions.reject(connection, [refused])
        [late] = submissions.insert_jobs(
            connection, [new_job(deadline=datetime.now(UTC) - timedelta(seconds=1))]
        )
        sweeps.expire_deadlines(connection, [late.id])
    [free] = ask(database)
    assert free.currency is None and free.cost == 0
    assert free.jobs[JobState.FAILED] == free.jobs[JobState.EXPIRED] == 1

    ended(database, 2)

    [row] = ask(database, by=("model",))
    assert row.currency == "EUR" and row.cost == Decimal("0.000000006")
    assert row.jobs == {
        JobState.FAILED: 1, JobState.EXPIRED: 1, JobState.COMPLETED: 2, JobState.CANCELLED: 0
    }  # fmt: skip
    assert (row.input_tokens, row.cached_tokens, row.output_tokens) == (20, 8, 10)
    assert row.mean_batch_size == 2.0
    assert (row.energy_method, row.energy_nj, row.carbon_ug) == (EnergyMethod.MEASURED, 4_000, 14)


def test_a_batch_is_summed_as_it_was_last_written_and_told_by_time_and_model_alone(
    database: Database,
) -> None:
    ended(database, 2)
    with database.begin() as connection:
        batch = connection.scalar(text("SELECT id FROM batches"))
    for useful in (30, 60):  # totals, not increments
        with database.begin() as connection:
            claims.finish(connection, [], [BatchStats(batch, useful, 80, 1_000)])
        fold(database)

    [row] = ask(database, by=("day", "model"))
    assert row.filling == Filling(1, 2, 60, 80)
    assert row.filling.padding_share == 0.25 and row.filling.mean_sequences == 2.0
    assert ask(database, by=("priority",))[0].filling is None
    assert ask(database, tenant="default")[0].filling is None
    ended(database, 1, model="other")  # whose batch has told nothing yet
    rows = ask(database, by=("model",), top=1)
    assert [row.filling and row.filling.batches for row in rows] == [1, None]

    with database.begin() as connection:
        connection.execute(text("DELETE FROM batches"))
    assert ask(database, by=("model",), top=1) == rows


def test_windows_are_summed_by_hour_device_and_price_and_tell_the_cost_at_real_use(
    database: Database,
) -> None:
    ended(database, 2)  # 6,000 ns
    with database.begin() as connection:
        connection.execute(text("UPDATE workers SET price_per_device_hour = 3.6"))
        worker_id = connection.scalar(text("SELECT id FROM workers"))
        for number in (1, 2, 2):  # one is written again
            window = Window(
                worker_id=worker_id, number=number, up_ns=12_000, load_ns=1_000, busy_ns=3_000,
                idle_ns=6_000, waste_ns=1_000, overhead_ns=500, open_ns=500, stray_ns=0,
                owed_ns=0, is_last=False, rounding=Decimal(0), energy_nj=360, load_nj=30,
                busy_nj=90, idle_nj=180, waste_nj=30, overhead_nj=15, open_nj=15,
            )  # fmt: skip
            windows.write(connection, window, age_s=0)
    while fold(database):
        pass

    since, until = EVER
    question = Question(since=since, until=until, by=("day",))
    with database.begin() as connection:
        connection.execute(text("DELETE FROM windows"))
        answer = usage.ask(connection, question)
        drawn = usage.drawn_nj(connection, since)

    [device] = answer.devices
    assert device.nj("up") == sum(device.nj(part) for part in PARTS) == 720
    assert drawn == {"load": 60, "busy": 180, "idle": 360, "waste": 60, "overhead": 30}
    assert (device.device, device.price, device.up_ns) == ("cpu", Decimal("3.6"), 24_000)
    assert sum(device.ns(part) for part in PARTS) == device.up_ns
    assert device.cost("idle") == Decimal("0.000000012")
    assert answer.rows[0].cost == Decimal("0.000000006")
    assert answer.rows[0].real_cost == device.cost("up") == Decimal("0.000000024")


def test_jobs_of_a_bulk_loader_are_summed_as_all_others(database: Database) -> None:
    ledger = Ledger(database)

    sizes.fill(database, 50, "bench", "A mill", age_s=7_200, over_s=7_200)

    ledger.look()
    assert told(database) == ledger.sums
    assert sum(sums["jobs_completed"] for sums in ledger.sums.values()) == 50


def test_no_number_is_too_large_to_be_summed(database: Database) -> None:
    most = 2**63 - 1
    free = dict.fromkeys(("price", "price_id", "currency", "cost"))

    ended(database, 3, free | {"device_ns": most, "input_tokens": 2**31 - 1})
    fold(database)
    ended(database, 1, free | {"device_ns": most, "input_tokens": 2**31 - 1})
    fold(database)

    [row] = ask(database)
    assert row.device_ns == 4 * most and row.input_tokens == 4 * (2**31 - 1)


# ── questions ───────────────────────────────────────────────────────────────────────────────────


def test_a_period_has_its_first_hour_and_not_its_last_and_one_without_data_is_empty(
    database: Database,
) -> None:
    ids = ended(database, 3)
    end_at(database, ids[:1], datetime(2027, 1, 31, 23, 59, 59, tzinfo=UTC))
    assert ask(database, since=datetime(2027, 2, 1, tzinfo=UTC), until=EVER[1]) == []

    [day] = ask(database, by=("day",), until=datetime(2027, 2, 1, tzinfo=UTC))

    assert day.group == {"day": datetime(2027, 1, 31, tzinfo=UTC)}
    [day] = ask(database, by=("day",), zone="Europe/Berlin")
    assert day.group == {"day": datetime(2027, 1, 31, 23, tzinfo=UTC)}


def test_groups_beyond_the_top_are_one_and_nothing_of_them_is_lost(database: Database) -> None:
    for priority in range(5):
        ended(database, 1 + priority, priority=priority)

    rows = ask(database, by=("day", "priority"), top=2)

    assert [(row.group["priority"], row.is_rest) for row in rows] == [
        (4, False), (3, False), (None, True)
    ]  # fmt: skip
    assert [row.jobs[JobState.COMPLETED] for row in rows] == [5, 4, 6]
    assert [each.jobs[JobState.COMPLETED] for each in ask(database, priority=3)] == [4]
    assert ask(database, model="none") == ask(database, tenant="nobody") == []


def test_usage_by_a_label_is_read_from_the_jobs_and_agrees_with_the_sums(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for customer in ("42", "7", None):
        labels = {} if customer is None else {"customer": customer, "x'--": "y"}
        ended(database, 2, metadata=labels)

    rows = ask(database, by=("metadata.customer",))
    assert {row.group["metadata.customer"]: row.tokens for row in rows} == {
        "42": 30, "7": 30, None: 30
    }  # fmt: skip
    [row] = ask(database, by=("hour",), metadata={"customer": "42"})
    assert row.cost == Decimal("0.000000006")
    assert [row.group for row in ask(database, by=("metadata.nobody's",))] == [
        {"metadata.nobody's": None}
    ]
    assert len(ask(database, by=("metadata.x'--",))) == 2

    monkeypatch.setattr(usage, "MAX_JOBS", 5)
    with pytest.raises(RequestError, match="More than 5 jobs"):
        ask(database, by=("metadata.customer",))


def test_an_answer_without_end_is_refused(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "MAX_ROWS", 2)
    for priority in range(3):
        ended(database, priority=priority)

    with pytest.raises(RequestError, match="more than 2 rows"):
        ask(database, by=("priority",))
