"""API keys from the command that makes one to the call that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from app import cli
from app.api import keyring
from app.api.app import check_start
from app.config.settings import Settings
from app.errors import ConfigError, GristmillError
from app.keys import NewKey, digest_of, id_of
from app.store.database import Database
from tests.apis import running_api, with_another_secret

Gristmill = Callable[..., tuple[int, str, str]]


@pytest.fixture
def gristmill(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    database_url: str,
    redis_url: str,
) -> Gristmill:
    """Run a command in this process; its exit code, output and words for people."""
    monkeypatch.setenv("GRISTMILL_DATABASE__URL", database_url)
    monkeypatch.setenv("GRISTMILL_BROKER__URL", redis_url)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def api(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """It looks at keys anew for each call."""
    monkeypatch.setattr(keyring, "FRESH_S", 0.0)
    with running_api(settings) as client:
        yield client


def status(api: httpx.Client, key: str | None) -> int:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return api.get("/v1/jobs", headers=headers).status_code


def test_the_first_key_closes_the_api_to_all_who_have_none(
    gristmill: Gristmill, api: httpx.Client
) -> None:
    assert status(api, None) == 200

    code, out, told = gristmill("keys", "create", "--name", "first")

    key = out.strip()
    assert (code, out.count("\n")) == (0, 1)
    assert (id_of(key) or "") in told and key not in told
    assert (status(api, key), status(api, None), status(api, key[:-1])) == (200, 401, 401)
    assert gristmill("keys", "revoke", id_of(key) or "")[0] == 0
    assert (status(api, key), status(api, None)) == (401, 401)


def test_a_key_that_is_rotated_overlaps_with_the_new_one(
    gristmill: Gristmill, api: httpx.Client, database: Database
) -> None:
    old = gristmill(
        *("keys", "create", "--name", "cron", "--tenant", "mill", "--scope", "read"),
        *("--expires", "90d"),
    )[1].strip()

    code, out, told = gristmill("keys", "rotate", id_of(old) or "", "--overlap", "1h")

    new = out.strip()
    assert (code, status(api, old), status(api, new)) == (0, 200, 200)
    assert f"The key {id_of(old)} ends at" in told
    listed = {key["id"]: key for key in json.loads(gristmill("keys", "list", "--json")[1])}
    before, after = listed[id_of(old) or ""], listed[id_of(new) or ""]
    same = ("tenant", "name", "scopes")
    assert {name: before[name] for name in same} == {name: after[name] for name in same}
    ends = datetime.fromisoformat(before["expires_at"]) - datetime.now(UTC)
    assert timedelta(minutes=50) < ends <= timedelta(hours=1)
    with database.begin() as connection:  # an hour later
        connection.execute(text("UPDATE api_keys SET expires_at = now() WHERE id <> :id"),
                           {"id": id_of(new)})  # fmt: skip
    assert (status(api, old), status(api, new)) == (401, 200)
    code, _, told = gristmill("keys", "rotate", id_of(old) or "")
    assert (code, "not valid any more" in told) == (1, True)


def test_only_the_digest_of_a_key_is_kept_and_its_last_use(
    gristmill: Gristmill, api: httpx.Client, database: Database
) -> None:
    key = gristmill("keys", "create", "--name", "first")[1].strip()

    def row() -> dict[str, Any]:
        with database.begin() as connection:
            return dict(connection.execute(text("SELECT * FROM api_keys")).one()._mapping)

    assert row()["last_used_at"] is None
    assert (bytes(row()["digest"]), key in str(row())) == (digest_of(key), False)
    assert status(api, with_another_secret(NewKey(id_of(key) or "", key))) == 401
    assert row()["last_used_at"] is None
    status(api, key)
    first = row()["last_used_at"]
    assert first is not None
    status(api, key)
    assert row()["last_used_at"] == first  # it is written rarely


def test_what_is_done_about_keys_is_in_a_log_that_only_grows(
    gristmill: Gristmill, database: Database
) -> None:
    key = gristmill("keys", "create", "--name", "cron", "--tenant", "mill")[1].strip()
    gristmill("keys", "rotate", id_of(key) or "")
    gristmill("keys", "revoke", id_of(key) or "")
    assert gristmill("keys", "revoke", id_of(key) or "")[0] == 0  # it was

    entries = json.loads(gristmill("keys", "log", "--tenant", "mill", "--json")[1])

    actions = ["key.revoked", "key.rotated", "key.created", "tenant.created"]
    assert [entry["action"] for entry in entries] == actions
    assert {entry["tenant"] for entry in entries} == {"mill"}
    assert all(entry["actor"].startswith("cli:") for entry in entries)
    assert key not in str(entries)
    assert "key.created" in gristmill("keys", "log")[1]
    for change in ("UPDATE admin_log SET actor = ''", "DELETE FROM admin_log"):
        with pytest.raises(GristmillError, match="P0001"), database.begin() as connection:
            connection.execute(text(change))


def test_a_purge_is_in_the_log_and_nothing_that_the_job_said(
    gristmill: Gristmill, api: httpx.Client
) -> None:
    key = gristmill("keys", "create", "--name", "cron", "--tenant", "mill")[1].strip()
    headers = {"x-api-key": key}
    body = {"body": {"prompt": "a secret"}, "metadata": {"customer": "secret"}}
    job_id = api.post("/v1/jobs", json=body, headers=headers).json()["id"]

    assert api.delete(f"/v1/jobs/{job_id}", headers=headers).status_code == 204

    entry = json.loads(gristmill("keys", "log", "--limit", "1", "--json")[1])[0]
    told = {name: entry[name] for name in ("action", "actor", "subject", "tenant", "details")}
    assert told == {
        "action": "job.purged",
        "actor": f"key:{id_of(key)}",
        "subject": job_id,
        "tenant": "mill",
        "details": {},
    }


@pytest.mark.parametrize(
    "wrong",
    [
        ["create"],
        ["create", "--name", ""],
        ["create", "--name", "a\0b"],
        ["create", "--name", "x" * 101],
        ["create", "--name", "x", "--tenant", ""],
        ["create", "--name", "x", "--tenant", "*"],
        ["create", "--name", "x", "--tenant", "a b"],
        ["create", "--name", "x", "--scope", "root"],
        ["create", "--name", "x", "--expires", "2020-01-01"],
        ["create", "--name", "x", "--expires", "soon"],
        ["rotate", "none", "--overlap", "-1h"],
        ["revoke"],
    ],
)
def test_what_cannot_be_a_key_is_wrong_usage(gristmill: Gristmill, wrong: list[str]) -> None:
    code, out, told = gristmill("keys", *wrong)

    assert (code, out) == (2, "")
    assert "Traceback" not in told


def test_a_key_that_nobody_has_is_no_traceback(gristmill: Gristmill) -> None:
    for command in ("rotate", "revoke"):
        code, out, told = gristmill("keys", command, "nobody's")
        assert (code, out) == (1, "")
        assert "There is no key nobody's." in told


def test_an_api_that_others_reach_does_not_start_without_a_key(
    database: Database, database_url: str, gristmill: Gristmill
) -> None:
    opened = Settings(database={"url": database_url}, api={"host": "0.0.0.0"})
    check_start(database, Settings(database={"url": database_url}))
    with pytest.raises(ConfigError, match="gristmill keys create"):
        check_start(database, opened)
    key = gristmill("keys", "create", "--name", "first")[1].strip()
    check_start(database, opened)
    gristmill("keys", "revoke", id_of(key) or "")

    with pytest.raises(ConfigError, match="there is no API key"):
        check_start(database, opened)


def test_a_key_is_made_while_nothing_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRISTMILL_CACHE_DIR", str(tmp_path / "cache"))

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert not end.value.code
        return capsys.readouterr().out

    key = run("keys", "create", "--name", "first").strip()

    assert id_of(key) in run("keys", "list")


def test_a_key_costs_no_statement_a_call(
    settings: Settings, gristmill: Gristmill, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    look_up = keyring.look_up

    def counted(database: Database, id: str, digest: bytes) -> Any:
        looks.append(id)
        return look_up(database, id, digest)

    monkeypatch.setattr(keyring, "look_up", counted)
    monkeypatch.setattr(keyring, "FRESH_S", 1e6)
    key = gristmill("keys", "create", "--name", "first")[1].strip()

    with running_api(settings) as api:
        assert {status(api, key) for _ in range(20)} == {200}

    assert len(looks) == 1
