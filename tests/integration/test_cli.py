"""Commands that talk to the real servers."""

from __future__ import annotations

import json

import pytest

from app import cli
from app.local.doctor import Finding, examine


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


def test_a_doctor_names_servers_that_do_not_answer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRISTMILL_BROKER__URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("GRISTMILL_DATABASE__URL", "postgresql://127.0.0.1:1/name")

    found = findings()

    assert "cannot be reached" in found["Postgres"].detail
    assert "check broker.url" in found["Redis"].detail


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
