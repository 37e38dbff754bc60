"""`gristmill up` for the tests: the whole system as a user starts it, with stub models inside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.signals import HEEDING_SIGNALS
from tests.waiting import eventually

_FILES = {
    "settings.toml": """
        cache_dir = "{folder}/the cache"
        [worker]
        lease_s = 4
        heartbeat_s = 1
    """,
    "models.toml": """
        [models.stub]
        source = "stub"
        kind = "generate"
        engine = "stub"
        default = true
        [models.stub-embed]
        source = "stub"
        kind = "embed"
        engine = "stub"
        default = true
    """,
    "prices.toml": """
        [prices.cpu]
        per_device_hour = "0.036"
        currency = "USD"
    """,
}


def write_stub_config(folder: Path) -> Path:
    """Settings, models and prices in a folder; the path of the settings."""
    for name, text in _FILES.items():
        (folder / name).write_text(text.replace("{folder}", str(folder)))
    return folder / "settings.toml"


class Up:
    """A `gristmill up` process with files of its own; other commands find it through `config`."""

    def __init__(
        self,
        folder: Path,
        more_settings: str = "",
        prefix: Sequence[str] = HEEDING_SIGNALS,
        *,
        detach: bool = False,
    ) -> None:
        self.config = write_stub_config(folder)
        self.cache_dir = folder / "the cache"
        self._output = folder / "up.out"
        with self.config.open("a") as settings:
            settings.write(more_settings)
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [*prefix, *self._command("up", *(["--detach"] if detach else []))],
                stdout=output,
                stderr=output,
                env=_environment(),
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def run_file(self) -> dict[str, Any]:
        return dict(json.loads((self.cache_dir / "run.json").read_text()))

    def wait_until_ready(self) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.output
            return "stops everything." in self.output

        eventually(is_ready, timeout_s=240)

    def gristmill(self, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Another command, as from another terminal."""
        return subprocess.run(
            self._command(*arguments),
            check=False,
            capture_output=True,
            text=True,
            env=_environment(),
            timeout=timeout_s,
        )

    @contextlib.contextmanager
    def following(self, part: str) -> Iterator[Path]:
        """`gristmill logs --follow PART` in another terminal; the file of its output."""
        file = self.config.with_name("followed")
        with file.open("wb") as output:
            process = subprocess.Popen(
                self._command("logs", "--follow", part), stdout=output, env=_environment()
            )
        try:
            yield file
        finally:
            process.kill()
            process.wait()

    def processes(self) -> list[psutil.Process]:
        """Every process of the system, by the cache folder in its environment or command line."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = [*process.cmdline(), *process.environ().values()]
                if any(str(self.cache_dir) in word for word in words):
                    found.append(process)
        return found

    def part(self, name: str) -> psutil.Process | None:
        """The child that runs a part, by its log file; None while it is down."""
        log = str(self.cache_dir / "logs" / f"{name}.log")
        for process in psutil.Process(self.process.pid).children():
            with contextlib.suppress(FileNotFoundError, PermissionError):  # it has just ended
                if str(Path(f"/proc/{process.pid}/fd/2").readlink()) == log:
                    return process
        return None

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(60) == 0, self.output

    def _command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "app.cli", "--config", str(self.config), *arguments]


@contextlib.contextmanager
def running_up(folder: Path) -> Iterator[Up]:
    """A system that is up and ready."""
    system = Up(folder)
    try:
        system.wait_until_ready()
        yield system
    finally:
        system.end()


def _environment() -> dict[str, str]:
    ours = {name: text for name, text in os.environ.items() if not name.startswith("GRISTMILL_")}
    return ours | {"OMP_NUM_THREADS": "1"}
