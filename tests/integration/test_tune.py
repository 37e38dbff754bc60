"""`gristmill tune` on jobs and batches that ran."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest

from app import cli
from app.store import claims, traffic
from app.store.claims import BatchStats, Member
from app.store.database import Database
from tests.rows import MODEL, Worker, completed, insert, new_job

SINCE, UNTIL = datetime.now(UTC) - timedelta(hours=1), datetime.now(UTC) + timedelta(hours=1)


def run_batch(database: Database, size: int, device_ns: int, rows: int = 1) -> list[UUID]:
    """Jobs of so many sequences each that come, and run together."""
    worker = Worker.registered(database)
    batch = worker.batch()
    ids = insert(database, *(new_job(max_output_tokens=8 * rows) for _ in range(size)))
    with database.begin() as connection:
        members = [Member(job_id, job_id, rows) for job_id in ids]
        granted = claims.claim(connection, batch, members)
        records = [completed(each, input_tokens=6 * rows) for each in granted]
        claims.finish(connection, records, [BatchStats(batch.id, 1, 1, device_ns)])
    return ids


def test_what_came_and_what_it_took_is_read_back(database: Database) -> None:
    run_batch(database, 3, 500)
    run_batch(database, 1, 200, rows=4)
    insert(database, new_job())  # has not run

    with database.begin() as connection:
        came = traffic.came(connection, MODEL, SINCE, UNTIL, 100)
        ran = traffic.ran(connection, MODEL, SINCE, UNTIL, 100)
        others = traffic.came(connection, "another", SINCE, UNTIL, 100)
        last = traffic.came(connection, MODEL, SINCE, UNTIL, 2)

    assert [(each.rows, each.input_tokens, each.output_tokens) for each in came] == [
        *[(1, 6, 8)] * 3,
        (4, 24, 32),
    ]
    assert {(each.generated, each.device_ns) for each in came} == {(0, 1_000)}
    assert [each.at for each in came] == sorted(each.at for each in came)
    assert [(each.rows, each.device_ns) for each in ran] == [(4, 200), (3, 500)]
    assert others == []
    assert last == came[-2:]


def test_settings_are_recommended_from_the_jobs_of_the_database(
    database: Database,
    database_url: str,
    redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "default.toml").write_text(
        f'cache_dir = "{tmp_path}"\n[database]\nurl = "{database_url}"\n'
        f'[broker]\nurl = "{redis_url}"\n'
    )
    (tmp_path / "models.toml").write_text(
        f'[models.{MODEL}]\nsource = "stub"\nkind = "generate"\nengine = "stub"\ndefault = true\n'
    )
    (tmp_path / "prices.toml").write_text('[prices.cpu]\nper_device_hour = "1"\ncurrency = "EUR"\n')
    monkeypatch.setenv("GRISTMILL_CONFIG", str(tmp_path / "default.toml"))

    def tune() -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["tune", MODEL, "--json"])
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    # given no job, one, and then some
    assert "holds no jobs" in tune()[2]
    run_batch(database, 1, 7_000_000)
    assert "holds one job" in tune()[2]
    for size in (1, 2, 3, 4):
        run_batch(database, size, 5_000_000 + 2_000_000 * size)

    code, out, err = tune()

    assert code == 0, err
    told = json.loads(out)
    assert told["trace"]["jobs"] == 11
    assert told["batch_ms"]["fixed"] == pytest.approx(5, rel=0.1)
    assert told["recommended"]["p95_ms"] <= told["now"]["p95_ms"]
