"""The command line: one clear line for an error, and an exit code that says which kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app import cli
from app.cli.api import Api
from app.errors import (
    ConfigError,
    GristmillError,
    JobNotFound,
    QueueFull,
    RequestError,
    SchemaError,
    Unavailable,
)
from gristmill_client import Job, JobFailed, JobState


@pytest.fixture
def gristmill(capsys: pytest.CaptureFixture[str]):
    """Run a command in this process; (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("max_tokens is wrong"), 1),
        (JobNotFound(), 1),
        (ConfigError("worker.lease_s is wrong"), 3),
        (SchemaError("too old"), 3),
        (Unavailable("nobody there"), 4),
        (QueueFull("come again"), 4),
        (JobFailed(Job("0b9f", JobState.FAILED, None, None, {})), 5),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    gristmill, monkeypatch: pytest.MonkeyPatch, error: GristmillError, code: int
):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Api, "client", fail)

    exit_code, out, err = gristmill("status", "0b9f")

    assert exit_code == code
    assert out == ""
    assert err == f"gristmill: {error}\n"


def test_wrong_usage_is_told_apart(gristmill):
    assert gristmill("nonsense")[0] == 2
    assert gristmill("submit")[0] == 2
    assert gristmill("submit", "text", "--set", "temperature")[0] == 2
    assert gristmill("config", "get", "api.prot")[0] == 2


def test_a_wrong_setting_names_file_and_line(gristmill, tmp_path: Path):
    file = tmp_path / "my.toml"
    file.write_text("[api]\nprot = 1\n")

    code, _, err = gristmill("--config", str(file), "config", "show")

    assert code == 3
    assert f"{file.name} line 2: api.prot is not a setting; did you mean port?" in err


def test_config_show_tells_where_a_value_comes_from(gristmill, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRISTMILL_DATABASE__URL", "postgresql://me:secret@host/name")

    code, out, _ = gristmill("config", "show", "--json")

    shown = json.loads(out)["database.url"]
    assert code == 0
    assert shown["value"] == "postgresql://me:***@host/name"
    assert shown["source"] == "environment variable GRISTMILL_DATABASE__URL"


def test_migrating_down_asks_how_far(gristmill, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GRISTMILL_DATABASE__URL", "postgresql://host/name")
    monkeypatch.setenv("GRISTMILL_BROKER__URL", "redis://host")

    code, _, err = gristmill("migrate", "down")

    assert code == 2
    assert "--to REVISION" in err


def test_a_reader_that_goes_away_is_no_traceback():
    code = "from app.cli import main; main(['config', 'show'])"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as gone:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=gone, stderr=subprocess.PIPE, check=False
        )

    assert (done.returncode, done.stderr) == (1, b"")
