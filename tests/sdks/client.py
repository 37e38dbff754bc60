"""A client of others, in an environment of its own below .cache/sdks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.pages import ROOT

SCRIPTS = Path(__file__).parent / "scripts"
ENVIRONMENTS = ROOT / ".cache" / "sdks"


@dataclass(frozen=True)
class Client:
    name: str
    packages: tuple[str, ...]
    script: str  #: in `scripts`; what it ends with is what is wrong

    @property
    def folder(self) -> Path:
        return ENVIRONMENTS / self.name

    def command(self) -> list[str]:
        """Installs what is missing. Raises `CalledProcessError`."""
        marker = self.folder / "installed"
        if not marker.exists() or marker.read_text() != str(self.packages):
            self._install()
            marker.write_text(str(self.packages))
        if self.script.endswith(".mjs"):
            copy = self.folder / self.script  # its modules are looked for beside it
            copy.write_text((SCRIPTS / self.script).read_text())
            return ["node", str(copy)]
        return [str(self.folder / "bin" / "python"), str(SCRIPTS / self.script)]

    def _install(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.script.endswith(".mjs"):
            steps = [["npm", "install", "--no-save", "--prefix", str(self.folder), *self.packages]]
        else:
            pip = [str(self.folder / "bin" / "python"), "-m", "pip", "install", "-q"]
            steps = [
                [sys.executable, "-m", "venv", str(self.folder)],
                [*pip, "--disable-pip-version-check", *self.packages],
            ]
        for step in steps:
            subprocess.run(step, check=True, capture_output=True, timeout=900)
