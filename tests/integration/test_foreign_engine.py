"""An engine of another package: installed beside Gristmill, named in a setting, and it runs."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from celery import Celery
from flit_core import buildapi

from app.config.settings import Settings
from app.engines import registry
from app.errors import ConfigError
from tests.waiting import eventually
from tests.workers import results, running_worker

PROJECT = """
[build-system]
requires = ["flit_core>=4"]
build-backend = "flit_core.buildapi"

[project]
name = "gristmill-mirror"
version = "1.0"
description = "An engine that gives prompts back, last token first."

[project.entry-points."gristmill.engines"]
mirror = "gristmill_mirror:ENGINE"
crooked = "gristmill_mirror:NONE_SUCH"
"""

SPEC = """
from app.engines.spec import EngineSpec, Files
from app.errors import ConfigError

def check(settings):
    if unknown := settings.options.keys() - {"shout"}:
        raise ConfigError(f"The engine mirror has no option {', '.join(sorted(unknown))}.")

ENGINE = EngineSpec(
    "gristmill_mirror.engine:MirrorEngine",
    files=lambda settings: Files.NONE,
    tokenizer="app.engines.text.tokenizer:stub_tokenizer",
    check="gristmill_mirror:check",
)
"""

ENGINE = """
import time
from app.engines.base import Generation, StepStats
from app.jobs import FinishReason

class MirrorEngine:
    joins = True

    def __init__(self, folder, settings, device, threads, progress):
        self._shouts, self._rows, self._stats = settings.options.get("shout", False), [], []
        self._most = settings.max_batch_size

    def admit(self, batch_id, sequences):
        self._rows += [(batch_id, each) for each in sequences]

    def step(self):
        batch_id, sequence = self._rows.pop()
        tokens = list(reversed(sequence.prompt_token_ids))
        text = bytes(tokens).decode()
        now = time.monotonic_ns()
        self._stats.append(StepStats(batch_id, 1, 2 * len(tokens), 2 * len(tokens), 1_000))
        return [Generation(
            sequence.id, FinishReason.STOP, tokens, text.upper() if self._shouts else text,
            input_tokens=len(tokens), device_ns=1_000, started_ns=now, first_token_ns=now,
            finished_ns=now,
        )]

    def cancel(self, sequence_id): pass
    def take_tokens(self): return []
    def close(self): pass

    @property
    def has_work(self): return bool(self._rows)

    @property
    def free_rows(self): return self._most - len(self._rows)

    def take_stats(self):
        taken, self._stats = self._stats, []
        return taken
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with the foreign one in it, from its wheel, as pip would leave it."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "gristmill_mirror").mkdir()
    (source / "gristmill_mirror" / "__init__.py").write_text(SPEC)
    (source / "gristmill_mirror" / "engine.py").write_text(ENGINE)
    before = Path.cwd()
    os.chdir(source)
    try:
        wheel = buildapi.build_wheel(str(site))
    finally:
        os.chdir(before)
    with zipfile.ZipFile(site / wheel) as archive:
        archive.extractall(site)
    return site


@pytest.fixture
def config(make_settings: Callable[..., Settings], database_url: str, redis_url: str) -> Settings:
    mirror = {
        "source": "none",
        "kind": "generate",
        "engine": "mirror",
        "default": True,
        "options": {"shout": True},
    }
    return make_settings(
        database={"url": database_url}, broker={"url": redis_url}, models={"mirror": mirror}
    )


def test_a_job_runs_on_an_engine_that_another_package_brings(
    installed: Path,
    config: Settings,
    producer: Celery,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # given a model that names an engine of a package that we know nothing of
    monkeypatch.setenv("PYTHONPATH", str(installed))

    # when a job is sent
    with running_worker(config, tmp_path / "worker"):
        sent = producer.send_task("inference.generate", kwargs={"prompt": "flour"})
        row = eventually(lambda: results(config).get(str(sent.id)), 20)

    # then that engine has answered, and its device time is in the books
    assert row["response"]["choices"][0]["text"] == "RUOLF"
    assert (row["state"], row["device_ns"]) == ("completed", 1_000)


def test_what_is_wrong_with_an_engine_of_another_package_is_said_by_its_name(
    installed: Path,
    make_settings: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(installed))
    registry._installed.cache_clear()
    try:
        with pytest.raises(
            ConfigError, match=r"engine crooked cannot be found in gristmill_mirror"
        ):
            registry.find("crooked")
        with pytest.raises(
            ConfigError, match=r"Unknown engine mirrors; known are crooked, encoder"
        ):
            registry.find("mirrors")
        wrong = make_settings(
            models={
                "m": {
                    "source": "none",
                    "kind": "generate",
                    "engine": "mirror",
                    "options": {"shouts": [1]},
                }
            }
        )
        with pytest.raises(ConfigError, match="has no option shouts"):
            registry.check(wrong.models["m"])
    finally:
        registry._installed.cache_clear()
