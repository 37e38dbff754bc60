"""The whole system with models of a benchmark, in a folder of its own that is gone afterwards."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from app.config.file import load
from app.local.child import Child
from app.local.supervisor import System

T = TypeVar("T")

PRICES: Final = """
[prices.cpu]
per_device_hour = "0.08"
currency = "USD"
"""
UNBOUNDED: Final = "max_queued_jobs = 1000000\nmax_queued_tokens = 1000000000\n"
"""Settings for a backlog of any length."""


def model_entry(name: str = "stub", **settings: Any) -> str:
    """Of models.toml; what is left open is a stub that generates, and the default of its kind."""
    stub = {"source": "stub", "kind": "generate", "engine": "stub", "default": True}
    lines = (f"{key} = {_toml(value)}\n" for key, value in (stub | settings).items())
    return f"[models.{name}]\n{''.join(lines)}"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{key} = {_toml(each)}' for key, each in value.items())} }}"
    return json.dumps(value, ensure_ascii=False)


class OwnSystem(System):
    """`settings` and `models` are texts of TOML, beside the folder and the ports."""

    def __init__(
        self, settings: str, models: str, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gristmill-bench-")
        folder = Path(self._folder.name)
        settings = f'cache_dir = "{folder}/cache"\n[flower]\nport = 0\n[api]\nport = 0\n{settings}'
        for name, text in (("default", settings), ("models", models), ("prices", PRICES)):
            (folder / f"{name}.toml").write_text(text)
        super().__init__(load(folder / "default.toml", {}), say)

    def add_worker(self, number: int) -> None:
        """One more beside the first, as from another terminal. Does not wait for it."""
        child = Child(
            f"worker-{number}",
            [sys.executable, "-m", "app.cli", "worker"],
            self._watch_log(f"worker-{number}").file,
            env=os.environ | {"GRISTMILL_CONFIG": str(self._config_path)},
        )
        self.parts.append(child)
        child.start()

    def stop(self) -> None:
        super().stop()
        self._folder.cleanup()


def eventually(answer: Callable[[], T | None], timeout_s: float, pause_s: float = 0.05) -> T:
    """The first true answer; the benchmark ends if there is none in time."""
    until = time.monotonic() + timeout_s
    while not (found := answer()):
        if time.monotonic() > until:
            sys.exit(f"The jobs have not ended within {timeout_s:.0f} s.")
        time.sleep(pause_s)
    return found
