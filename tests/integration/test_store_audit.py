"""The audit is silent about books that balance, and names what does not, rule by rule."""

from __future__ import annotations

import json
from dataclasses import dataclass
from decimal import Decimal
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from app.books.cost import device_cost
from app.books.energy import EnergyMethod
from app.cli import main
from app.config.settings import PriceSettings, Settings
from app.jobs import AttemptOutcome
from app.store import prices, windows
from app.store.audit import RULES, Audit, audit
from app.store.claims import BatchStats, Claimed, Finished, Member, claim, finish
from app.store.database import Database
from app.store.releases import Release, release
from app.store.windows import Window
from tests.rows import Worker, completed, insert, new_job

Capture = pytest.CaptureFixture[str]
PRICE = Decimal("0.036")
"""Of `tests.rows.Worker`: 10 nano-units for a millisecond."""


WATTS = 30
ENERGY_OF = {"energy": "device", "wasted": "wasted"}


@dataclass
class Books:
    """Two windows of one worker: a job that was billed, one that was given back, and idle time."""

    database: Database
    worker: Worker

    def audit(self) -> Audit:
        with self.database.begin() as connection:
            return audit(connection, None, None)

    def broken(self) -> set[str]:
        return {each.rule.name for each in self.audit().differences}

    def tamper(self, statement: str) -> None:
        """Change rows as no statement of ours does, and no constraint allows."""
        with self.database.begin() as connection:
            for table in ("windows", "attempts", "results", "batches"):
                names = connection.scalars(
                    text(
                        "SELECT conname FROM pg_constraint WHERE contype = 'c'"
                        " AND conrelid = CAST(:table AS regclass)"
                    ),
                    {"table": table},
                )
                for name in list(names):
                    connection.execute(text(f"ALTER TABLE {table} DROP CONSTRAINT {name}"))
            connection.execute(text(statement))


@pytest.fixture
def books(database: Database) -> Books:
    worker = Worker.registered(database)
    price = PriceSettings.model_validate({"per_device_hour": PRICE, "currency": "EUR"})
    with database.begin() as connection:
        prices.keep(connection, {"cpu": price})
    done, given_back = insert(database, new_job(), new_job())
    _settle(database, worker, done, device_ns=1_234_567, wasted_ns=100, number=1)
    with database.begin() as connection:
        batch = worker.batch()
        [claimed] = claim(connection, batch, [Member(given_back, uuid4())])
        given = Release(
            job_id=given_back,
            attempt_id=claimed.attempt_id,
            created_at=claimed.created_at,
            outcome=AttemptOutcome.RELEASED,
            charged=False,
            wasted_ns=5_000,
            wasted_nj=5_000 * WATTS,
            energy_method=EnergyMethod.MEASURED,
        )
        release(connection, [given], [BatchStats(batch.id, 0, 0, 5_000)], window_number=2)
    for number, busy_ns, waste_ns, open_ns in ((1, 1_234_567, 100, 3_000), (2, 0, 5_000, -3_000)):
        _close(database, worker, number, busy_ns, waste_ns, open_ns)
    return Books(database, worker)


def _settle(
    database: Database, worker: Worker, job_id: UUID, *, number: int, **took: int
) -> Claimed:
    with database.begin() as connection:
        batch = worker.batch()
        [claimed] = claim(connection, batch, [Member(job_id, uuid4())])
        bill = {"currency": "EUR", "price_id": "cpu", "price": PRICE}
        energy = {"energy_method": EnergyMethod.MEASURED}
        energy |= {f"{name}_nj": took[f"{ns}_ns"] * WATTS for name, ns in ENERGY_OF.items()}
        done: Finished = completed(
            claimed, **took, **bill, **energy, cost=device_cost(took["device_ns"], PRICE)
        )
        stats = BatchStats(batch.id, 1, 1, sum(took.values()))
        finish(connection, [done], [stats], window_number=number)
    return claimed


def _close(
    database: Database, worker: Worker, number: int, busy_ns: int, waste_ns: int, open_ns: int
) -> None:
    parts = {"load": 777_777, "busy": busy_ns, "idle": 1_555_555, "waste": waste_ns}
    parts |= {"overhead": 4_321, "open": open_ns}
    up_ns = sum(parts.values())
    costs = [device_cost(part, PRICE) for part in parts.values()]
    window = Window(
        worker_id=worker.id,
        number=number,
        up_ns=up_ns,
        **{f"{name}_ns": ns for name, ns in parts.items()},
        energy_nj=up_ns * WATTS,
        **{f"{name}_nj": ns * WATTS for name, ns in parts.items()},
        energy_method=EnergyMethod.MEASURED,
        energy_boundary="gpu",
        stray_ns=0,
        owed_ns=0,
        is_last=number == 2,
        rounding=device_cost(up_ns, PRICE) - sum(costs),
    )
    with database.begin() as connection:
        windows.write(connection, window, 0.0)


def test_books_that_balance_are_summed_and_nothing_is_said(books: Books) -> None:
    found = books.audit()

    [sums] = found.sums
    assert (found.differences, found.outside, found.difference_nano) == ([], [], 0)
    assert (sums.currency, sums.num_windows, sums.num_attempts) == ("EUR", 2, 2)
    parts = sum(sums.ns[name] for name in ("load", "busy", "idle", "waste", "overhead", "open"))
    assert sums.ns["up"] == parts and sums.ns["busy"] == 1_234_567 and sums.ns["waste"] == 5_100
    assert sums.nj["up"] == WATTS * sums.ns["up"] and sums.nj["waste"] == WATTS * 5_100
    assert sums.nano is not None
    assert sums.nano["up"] == sum(ns for name, ns in sums.nano.items() if name != "up")


@pytest.mark.parametrize(
    ("rule", "statement"),
    [
        ("parts", "UPDATE windows SET idle_ns = idle_ns + 1 WHERE number = 1"),
        ("billed", "UPDATE attempts SET device_ns = device_ns + 1 WHERE outcome = 'succeeded'"),
        ("wasted", "UPDATE attempts SET wasted_ns = wasted_ns - 1 WHERE outcome = 'released'"),
        ("wasted", "UPDATE windows SET stray_ns = 1 WHERE number = 2"),
        ("money", "UPDATE windows SET rounding = rounding + 0.000000001 WHERE number = 1"),
        ("joules", "UPDATE windows SET energy_nj = energy_nj - 1 WHERE number = 1"),
        ("paid", "UPDATE attempts SET energy_nj = energy_nj + 1 WHERE outcome = 'succeeded'"),
        ("burnt", "UPDATE attempts SET wasted_nj = NULL WHERE outcome = 'released'"),
        ("drawn", "UPDATE windows SET open_nj = -1 WHERE number = 1"),
        ("drawn", "UPDATE windows SET open_nj = open_nj + 1 WHERE number = 2"),
        ("result", "UPDATE results SET energy_method = 'absent'"),
        ("numbers", "UPDATE windows SET number = 3 WHERE number = 2"),
        ("open", "UPDATE windows SET open_ns = -1 WHERE number = 1"),
        ("closed", "UPDATE windows SET open_ns = open_ns + 1 WHERE number = 2"),
        ("after", "DELETE FROM attempts WHERE outcome = 'released'; "
         "UPDATE attempts SET window_number = 3"),
        ("untold", "UPDATE attempts SET window_number = NULL WHERE outcome = 'succeeded'"),
        ("bill", "UPDATE attempts SET cost = cost - 0.000000001 WHERE outcome = 'succeeded'"),
        ("result", "UPDATE results SET cost = cost + 0.000000001"),
        ("result", "UPDATE results SET attempt_id = gen_random_uuid()"),
        ("vain", "UPDATE attempts SET device_ns = 1 WHERE outcome = 'released'"),
        ("price", "UPDATE attempts SET price = 1 WHERE outcome = 'succeeded'"),
        ("price", "UPDATE windows SET currency = 'USD' WHERE number = 1"),
        ("batch", "UPDATE batches SET device_ns = device_ns + 1"),
    ],
)  # fmt: skip
def test_a_row_that_was_tampered_with_breaks_a_rule_by_name(
    books: Books, rule: str, statement: str
) -> None:
    books.tamper(statement)

    found = {each.rule.name: each for each in books.audit().differences}
    assert rule in found
    assert found[rule].rows[0][1] != 0 and found[rule].sum_of_differences > 0


def test_the_difference_of_one_nanosecond_is_told_with_its_row(books: Books) -> None:
    books.tamper("UPDATE attempts SET wasted_ns = wasted_ns + 1 WHERE outcome = 'released'")

    found = {each.rule.name: each for each in books.audit().differences}

    assert found["wasted"].rows == [(f"window 2 of worker {books.worker.id}", -1)]
    assert set(found) == {"wasted", "batch"}


def test_what_a_living_worker_and_a_lost_one_have_not_told_is_named_and_no_difference(
    books: Books, database: Database
) -> None:
    living, killed = Worker.registered(database), Worker.registered(database)
    for worker in (living, killed):
        [job] = insert(database, new_job())
        _settle(database, worker, job, number=1, device_ns=7, wasted_ns=0)
    with database.begin() as connection:
        connection.execute(
            text("UPDATE workers SET lease_expires_at = now() WHERE id = :id"), {"id": killed.id}
        )

    found = books.audit()

    assert found.differences == []
    told = {(each.worker, each.is_lost, each.num_attempts, each.ns) for each in found.outside}
    assert told == {(str(living.id), False, 1, 7), (str(killed.id), True, 1, 7)}


def test_every_rule_is_a_sentence_with_a_name_of_its_own() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES) >= 10
    assert all(rule.sentence.endswith(".") for rule in RULES)


def test_the_command_tells_by_its_exit_code_whether_the_books_balance(
    books: Books, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("GRISTMILL_DATABASE__URL", settings.database.url)
    monkeypatch.setenv("GRISTMILL_BROKER__URL", settings.broker.url)

    assert _run("audit") == 0
    assert "The books balance." in capsys.readouterr().out

    books.tamper("UPDATE windows SET rounding = rounding - 0.000000001 WHERE number = 1")

    assert _run("audit", "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["balances"], told["difference_nano"]) == (False, 1)
    [difference] = told["differences"]
    assert (difference["rule"], difference["unit"], difference["sum"]) == ("money", "nano", 1)
    assert _run("audit", "--until", "1d") == 0
    assert "No window was closed in this period." in capsys.readouterr().out
    assert _run("audit", "--since", "1h", "--until", "2h") == 2


def _run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)
