"""`gristmill compare` on real engine processes of the stub engine, kept in a real Postgres."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import text

from app import cli
from app.demo.prompts import prompts
from app.store.database import Database

Run = Callable[..., tuple[int, str, str]]

MODELS = """
[models.echo]
source = "stub"
kind = "generate"
engine = "stub"
default = true
max_batch_size = 4

[models.vectors]
source = "stub"
kind = "embed"
engine = "stub"
default = true
"""


@pytest.fixture
def gristmill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process; (exit code, standard output, standard error)."""
    (tmp_path / "models.toml").write_text(MODELS)
    (tmp_path / "prices.toml").write_text(
        '[prices.cpu]\nper_device_hour = "3600"\ncurrency = "EUR"\n'
    )
    (tmp_path / "own.toml").write_text(
        f'cache_dir = "{tmp_path / "cache"}"\n[worker]\ndevice = "cpu"\nprice = "cpu"\n'
        '[energy]\nsource = "model"\nidle_watts = 1.0\nbusy_watts = 10.0\n'
    )

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            cli.main(["--config", str(tmp_path / "own.toml"), *arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def _text_of(body: dict[str, Any]) -> str:
    found = body.get("prompt") or body.get("input") or body["messages"][0]["content"]
    return json.dumps(found).strip('"')


def test_a_comparison_is_told_drawn_and_kept_and_the_next_one_is_held_against_it(
    gristmill: Run, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a model, and the same in batches of one
    monkeypatch.setenv("GRISTMILL_DATABASE__URL", database_url)
    both = ("echo", "echo:max_batch_size=1,batch.policy=adaptive")

    # when they are compared twice, and once over other prompts
    page = tmp_path / "page.html"
    short = ("--limit", "5", "--rounds", "1")
    code, out, err = gristmill("compare", *both, *short, "--json", "--html", str(page))
    again = gristmill("compare", *both, *short)
    other = gristmill("compare", *both, *short, "--rate", "50", "--json")

    # then all is told
    found = json.loads(out)
    assert (code, found["compare"], found["prompts"], found["earlier"]) == (0, [*both], 5, []), err
    assert found["agreement"].pop("logprob_max") == 0
    assert found["agreement"] == {
        **dict.fromkeys(("identical", "prefix", "positions", "same_token"), 1.0),
        **dict.fromkeys(("logprob_mean", "perplexity"), 0.0),
    }
    for name in ("a", "b"):
        side = found[name]
        assert side["num_tokens"] > 0
        assert (side["num_failed"], len(side["tokens_per_s"]), side["currency"]) == (0, 1, "EUR")
        assert 0 < side["p50_ms"] <= side["p95_ms"]
        assert side["cost_per_million_tokens"] == pytest.approx(
            1e6 * side["device_s"] / side["num_tokens"], rel=1e-6
        )
        assert (side["energy"], side["joules_per_million_tokens"] > 0) == ("estimated", True)
        assert side["peak_bytes"] > 1e6
    assert page.read_text().count("<svg") == 5
    assert "Kept in the table comparisons: the first of these." in err

    # and the second beside the first, which the other is not like
    assert "there are 1 earlier ones of the same" in again[2]
    assert "identical 100.00%" in again[1].splitlines()[-1]
    assert json.loads(other[1])["earlier"] == []

    # and kept are figures alone
    with closing(Database(database_url)) as database, database.begin() as connection:
        rows = connection.execute(text("SELECT * FROM comparisons")).mappings().all()
    assert len(rows) == 3
    told = json.dumps([dict(row) for row in rows], default=str)
    assert not [each for each in prompts() if _text_of(each) in told]
    code, out, _ = gristmill("compare", "--history", "--limit", "2", "--json")
    assert [json.loads(line)["rate"] for line in out.splitlines()] == [50, None]
    assert gristmill("compare", "--history", "echo", "nobody")[1] == ""

    # and no engine process is left
    assert not [each for each in psutil.Process().children() if "launch.py" in str(each.cmdline())]


def test_without_a_database_it_is_told_and_not_kept(gristmill: Run) -> None:
    code, out, err = gristmill(
        *("compare", "vectors", "vectors:worker.price=", "--limit", "3", "--rounds", "1", "--json")
    )

    found = json.loads(out)
    assert (code, found["agreement"]["cosine_min"]) == (0, pytest.approx(1))
    assert (found["b"]["cost_per_million_tokens"], found["b"]["currency"]) == (None, None)
    assert "Not kept: no database is set" in err
    assert gristmill("compare", "--history")[0] == 3


def test_a_database_that_is_not_there_costs_no_comparison(
    gristmill: Run, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRISTMILL_DATABASE__URL", empty_database_url)

    code, out, err = gristmill("compare", "echo", "echo", "--limit", "2", "--rounds", "1", "--json")

    assert (code, json.loads(out)["agreement"]["identical"]) == (0, 1.0)
    assert "Not kept: The database has no Gristmill schema" in err


def test_wrong_use_is_told_before_anything_is_loaded(gristmill: Run, tmp_path: Path) -> None:
    (tmp_path / "two.jsonl").write_text('{"prompt": "a"}\n{"input": "b"}\n')

    for arguments, told in (
        ([], "Name two, as in: gristmill compare MODEL MODEL:dtype=float32"),
        (["echo"], "Name two"),
        (["echo", "ech"], "There is no model ech; there is echo, vectors."),
        (["echo", "vectors"], "echo is of kind generate and vectors of kind embed"),
        (["echo", "echo:dtype=int4"], "models.echo.dtype should be"),
        (["echo", "echo", "--rounds", "0"], "--rounds"),
        (
            ["echo", "echo", "--prompts", str(tmp_path / "two.jsonl")],
            "line 2: This is a request to",
        ),
        (["echo", "echo", "--rate", "0"], "--rate"),
        (["echo", "echo", "--rate", "nan"], "--rate"),
        (["echo", "echo", "--html", str(tmp_path)], "is a directory"),
        (["echo", "echo", "--html", str(tmp_path / "no" / "a.html")], "there is no folder"),
    ):
        code, out, err = gristmill("compare", *arguments)
        assert (code, out) == (2, ""), (arguments, err)
        assert told in " ".join(err.split()), (arguments, err)


def test_a_guard_that_had_nothing_to_compare_lets_nobody_pass(gristmill: Run) -> None:
    code, out, err = gristmill("verify", "--fail-under", "0")

    assert (code, out) == (1, "")
    assert err.count("Left out: ") == 2


def test_an_engine_that_dies_is_told_in_a_sentence(gristmill: Run, tmp_path: Path) -> None:
    file = tmp_path / "crash.txt"
    file.write_text("crash\n")

    code, _, err = gristmill("compare", "echo", "echo", "--prompts", str(file))

    assert code == 1
    assert "echo: the engine ended: " in err
    assert "Traceback" not in err
