"""The client as others install it: a package of its own, which takes no name of theirs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from app import errors as answered
from app.api.problems import STATUS
from gristmill_client import errors
from tests.pages import ROOT

BUILD = "import sys; from flit_core.buildapi import build_wheel; print(build_wheel(sys.argv[1]))"
USE = """
import sys
others = ["app", "celery", "redis", "sqlalchemy", "psycopg", "torch", "pydantic", "fastapi"]
sys.modules |= dict.fromkeys(others)
sys.path.insert(0, sys.argv[1])
import gristmill_client
assert gristmill_client.__file__.startswith(sys.argv[1])
"""


def test_its_wheel_holds_one_typed_package_that_needs_httpx_alone(tmp_path: Path) -> None:
    folder = ROOT / "clients" / "python"

    built = subprocess.run(
        [sys.executable, "-c", BUILD, str(tmp_path)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )

    wheel = tmp_path / built.stdout.split()[-1]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"gristmill_client", "gristmill_client-0.1.0.dist-info"}
    assert "gristmill_client/py.typed" in names
    subprocess.run([sys.executable, "-c", USE, str(tmp_path / "installed")], check=True)


@pytest.mark.parametrize("kind", STATUS, ids=lambda kind: kind.__name__)
def test_an_error_that_the_api_answers_is_known_by_its_code(kind: type[Exception]) -> None:
    problem = {"code": kind.code, "detail": "Why.", "param": "body.model"}  # type: ignore[attr-defined]

    error = errors.error_of(problem)

    assert (error.code, error.message) == (problem["code"], "Why.")
    for base in ("RequestError", "QueueFull"):
        assert issubclass(kind, getattr(answered, base)) == isinstance(error, getattr(errors, base))
    assert getattr(error, "param", "body.model") == "body.model"
