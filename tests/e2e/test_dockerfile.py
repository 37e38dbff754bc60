"""The Dockerfile's steps, followed in a clean folder: what it installs is a Gristmill that runs.

No Docker engine is needed: COPY and RUN are carried out below a folder that stands for `/`. Left
out is what needs root or another machine: packages of the distribution and the user account.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose import ROOT

_NOT_HERE = ("apt-get", "rm -rf /var/lib/apt", "useradd", "install --directory --owner")


class Image:
    """Folders that stand for an image's, and the variables it sets."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._work = folder
        own = Path(sys.executable).parent
        self.environment = {
            "HOME": str(folder),
            "PATH": os.pathsep.join([str(own), os.environ["PATH"]]),
            "PIP_NO_COMPILE": "1",  # only saves time
            **{name: text for name, text in os.environ.items() if name.startswith("PIP_")},
        }

    def build(self) -> None:
        for instruction, rest in _instructions((ROOT / "Dockerfile").read_text()):
            match instruction:
                case "WORKDIR":
                    self._work = self._at(rest)
                    self._work.mkdir(parents=True, exist_ok=True)
                case "COPY":
                    self._copy(shlex.split(rest))
                case "ENV" | "ARG":
                    for word in shlex.split(rest):
                        name, _, text = word.partition("=")
                        text = text.replace("$PATH", self.environment["PATH"])
                        self.environment[name] = self._moved(text)
                case "RUN":
                    self._run(rest)
                case "FROM" | "USER" | "VOLUME" | "EXPOSE" | "CMD":
                    pass
                case other:
                    raise AssertionError(f"the test does not know {other}")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=self._work,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def _run(self, command: str) -> None:
        steps = re.sub(r"--mount=\S+", "", command).split("&&")
        for step in steps:
            if any(words in step for words in _NOT_HERE):
                continue
            done = self.run("sh", "-c", self._moved(step.strip(), quote='"'))
            assert done.returncode == 0, f"{step}\n{done.stdout}\n{done.stderr}"

    def _copy(self, words: list[str]) -> None:
        if words[0].startswith("--from="):
            return  # both stages share the folder
        *sources, target = words
        for source in sources:
            place = self._work / target if len(sources) == 1 else self._work / target / source
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, place, ignore=ignored)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, place)

    def _moved(self, text: str, quote: str = "") -> str:
        """Absolute folders of the image, below the folder that stands for its root.

        A shell wants it in quotes: the path of a checkout may have a space.
        """
        root = f"{quote}{self._folder}{quote}/"
        return re.sub(r"(?<![\w/.])/(?=(venv|app|cache)\b)", lambda _: root, text)

    def _at(self, path: str) -> Path:
        return self._folder / path.lstrip("/")


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        instruction, _, rest = line.partition(" ")
        yield instruction, rest.strip()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_dockerfiles_steps_make_a_gristmill_that_runs(tmp_path: Path):
    image = Image(tmp_path)

    image.build()

    shown = image.run("gristmill", "config", "get", "cache_dir")
    assert shown.stdout.strip() == str(tmp_path / "cache"), shown.stderr
    doctor = image.run("gristmill", "doctor")
    assert doctor.returncode == 0, doctor.stdout
    assert f"{tmp_path}/venv" in doctor.stdout  # its own Python, not ours
