"""Real worker processes for the tests: Celery, engine process and all, with stub models."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from app.config.settings import Settings
from tests.signals import HEEDING_SIGNALS
from tests.waiting import eventually

_MAIN = """
import sys
import app.worker
from app.broker.app import make_app
from app.broker.commands import worker_command
from app.config.settings import Settings
from celery.bin.celery import celery
from pathlib import Path

settings = Settings.model_validate_json(Path(sys.argv[1]).read_text())
app.worker.app = app = make_app(settings)
celery.params[0].default = app  # as `app.worker_main` does, which forgets the exit status
sys.exit(celery.main(worker_command(settings)[0][5:], standalone_mode=False))
"""


class Worker:
    """One worker process; its log is kept in a file."""

    def __init__(self, settings: Settings, folder: Path, prelude: str = "") -> None:
        """`prelude` is Python that breaks something in the process before it starts."""
        self.settings = settings
        self._prelude = prelude
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        assert self._process is not None
        return self._process.poll() is not None

    @property
    def is_down(self) -> bool:
        """It has ended, or was never started."""
        return self._process is None or self.has_ended

    @property
    def log(self) -> str:
        return (self._folder / "worker.log").read_text()

    def start(self, timeout_s: float = 60) -> Worker:
        """Start it and wait until it has registered, that is, until the models are loaded."""
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / "settings.json"
        file.write_text(self.settings.model_dump_json())
        before = len(rows(self.settings, "SELECT id FROM workers"))
        with open(self._folder / "worker.log", "ab") as log:
            self._process = subprocess.Popen(
                [*HEEDING_SIGNALS, sys.executable, "-c", self._prelude + _MAIN, str(file)],
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

        def registered() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, self.log
            return len(rows(self.settings, "SELECT id FROM workers")) > before

        eventually(registered, timeout_s)
        return self

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self, timeout_s: float) -> int:
        assert self._process is not None
        return self._process.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL, as the kernel or an operator would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@contextmanager
def running_worker(
    settings: Settings, folder: Path, prelude: str = "", timeout_s: float = 60
) -> Iterator[Worker]:
    """`timeout_s` is the longest time to load the models."""
    worker = Worker(settings, folder, prelude)
    try:
        yield worker.start(timeout_s)
    finally:
        worker.kill()


def rows(settings: Settings, query: str, *values: Any) -> list[dict[str, Any]]:
    """What a query finds in the test's database."""
    url = settings.database.url
    with psycopg.connect(url, autocommit=True, row_factory=dict_row) as connection:
        return connection.execute(query, values).fetchall()  # type: ignore[arg-type]


def results(settings: Settings) -> dict[str, dict[str, Any]]:
    """All result rows, by job id as text."""
    return {str(row["job_id"]): row for row in rows(settings, "SELECT * FROM results")}
