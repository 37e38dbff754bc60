"""The whole system with models of a benchmark, in a folder of its own that is gone afterwards."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from app.config.file import load
from app.local.child import Child
from app.local.supervisor import System

_PRICES: Final = """
[prices.cpu]
per_device_hour = "0.08"
currency = "USD"
"""


class OwnSystem(System):
    """`settings` and `models` are texts of TOML, beside the folder and the ports."""

    def __init__(
        self, settings: str, models: str, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gristmill-bench-")
        folder = Path(self._folder.name)
        settings = f'cache_dir = "{folder}/cache"\n[flower]\nport = 0\n[api]\nport = 0\n{settings}'
        for name, text in (("default", settings), ("models", models), ("prices", _PRICES)):
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
