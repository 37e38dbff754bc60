"""Commands in this process, against an API in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import httpx
import pytest

from app import cli
from app.cli import api as api_module
from gristmill_client import Client
from tests.fake_api import FakeApi
from tests.signals import heeding_signals

Gristmill = Callable[..., tuple[int, str, str]]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake = FakeApi()
    client = partial(Client, transport=httpx.MockTransport(fake))
    monkeypatch.setattr(api_module, "Client", client)
    return fake


@pytest.fixture
def gristmill(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> Gristmill:
    """Run a command in this process; (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with heeding_signals(), pytest.raises(SystemExit) as end:
            cli.main(arguments)
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return run
