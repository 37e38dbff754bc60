"""Commands that talk to the real servers."""

from __future__ import annotations

import json
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from uuid import uuid4

import pytest

from app import cli
from app.config.file import PROJECT
from app.local.doctor import Finding, examine
from app.store.database import Database
from app.store.workers import NewWorker, register_worker
from tests.families.broken import configure
from tests.unit.tiny_models import save_llama


@pytest.fixture
def gristmill(capsys: pytest.CaptureFixture[str]):
    """Run a command in this process; (exit code, standard output and error)."""

    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out + captured.err

    return run


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, redis_url: str, empty_database_url: str) -> None:
    monkeypatch.setenv("GRISTMILL_BROKER__URL", redis_url)
    monkeypatch.setenv("GRISTMILL_DATABASE__URL", empty_database_url)


def findings() -> dict[str, Finding]:
    return {finding.name: finding for finding in examine()}


@pytest.mark.usefixtures("environment")
def test_the_schema_goes_up_and_down_and_is_checked(gristmill):
    assert gristmill("migrate", "check") == (
        3,
        "gristmill: The database has no Gristmill schema. Run: gristmill migrate\n",
    )
    assert gristmill("migrate")[0] == 0
    assert gristmill("migrate", "check")[0] == 0

    assert gristmill("migrate", "down", "--to", "base", "--yes")[0] == 0
    assert gristmill("migrate", "check")[0] == 3


@pytest.mark.usefixtures("environment")
def test_a_doctor_says_what_to_do_about_a_missing_schema(gristmill):
    code, out = gristmill("doctor", "--json")

    found = {finding["name"]: finding for finding in json.loads(out)}
    assert code == 1
    assert found["Postgres"]["ok"] is False
    assert found["Postgres"]["detail"].endswith("Run: gristmill migrate")
    assert found["Redis"]["ok"] is True


@pytest.mark.usefixtures("environment")
def test_a_doctor_says_how_the_workers_run_their_models(gristmill, empty_database_url: str):
    # given a worker that found padding to change its model's answers
    gristmill("migrate")
    worker = NewWorker(
        id=uuid4(),
        name="worker@here",
        host="here",
        pid=1,
        models=["rwkv"],
        device="cpu",
        price_id="cpu",
        currency="EUR",
        price_per_device_hour=Decimal(1),
        engine={"kernels": {"rwkv": "torch, by equal length"}},
    )
    with closing(Database(empty_database_url)) as database, database.begin() as connection:
        register_worker(connection, worker, lease_s=60)

    # when
    said = findings()["engines"]

    # then
    assert (said.ok, said.detail) == (None, "rwkv: torch, by equal length")


def test_a_doctor_names_servers_that_do_not_answer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRISTMILL_BROKER__URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("GRISTMILL_DATABASE__URL", "postgresql://127.0.0.1:1/name")

    found = findings()

    assert "cannot be reached" in found["Postgres"].detail
    assert "check broker.url" in found["Redis"].detail


def test_a_doctor_says_what_is_wrong_with_a_models_folder(tmp_path: Path, monkeypatch):
    # given a model whose weights are those of another configuration
    folder = save_llama(tmp_path / "llama")
    configure(intermediate_size=48)(folder)
    (tmp_path / "settings.toml").touch()
    (tmp_path / "models.toml").write_text(
        f'[models.bad]\nsource = "{folder}"\nkind = "generate"\nengine = "inflight"\n'
        "default = true\n"
    )
    (tmp_path / "prices.toml").write_text((PROJECT / "configs" / "prices.toml").read_text())
    monkeypatch.setenv("GRISTMILL_CONFIG", str(tmp_path / "settings.toml"))

    found = findings()["model bad"]

    assert found.ok is False
    assert "do not belong together" in found.detail


def test_a_doctor_reports_wrong_settings_and_stops(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRISTMILL_API__PORT", "many")

    found = findings()

    assert list(found) == ["Python", "settings"]
    assert "GRISTMILL_API__PORT" in found["settings"].detail


def test_rescue_can_be_asked_whether_it_is_alive(gristmill, tmp_path, monkeypatch):
    monkeypatch.setenv("GRISTMILL_CACHE_DIR", str(tmp_path))
    assert gristmill("rescue", "--check")[0] == 1

    (tmp_path / "rescue.alive").touch()

    assert gristmill("rescue", "--check")[0] == 0
