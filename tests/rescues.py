"""Real rescue and API processes for the tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.config.settings import Settings
from tests.signals import HEEDING_SIGNALS

_MAIN = """
import sys
from pathlib import Path
from app import rescue, telemetry
from app.config.settings import Settings

telemetry.setup_logging()
rescue.serve(Settings.model_validate_json(Path(sys.argv[1]).read_text()))
"""


_API = """
import sys
from pathlib import Path
from app.api.app import serve
from app.config.settings import Settings

serve(Settings.model_validate_json(Path(sys.argv[1]).read_text()))
"""


@contextmanager
def running_api_process(settings: Settings, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """An API that may be killed, at `settings.api.port`; its log is `api.log`."""
    with _running(_API, settings, folder, "api.log") as process:
        yield process


@contextmanager
def running_rescue(settings: Settings, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A rescue process that is killed at the end of the block; its log is `rescue.log`."""
    with _running(_MAIN, settings, folder, "rescue.log") as process:
        yield process


@contextmanager
def _running(
    main: str, settings: Settings, folder: Path, log_name: str
) -> Iterator[subprocess.Popen[bytes]]:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    file.write_text(settings.model_dump_json())
    command = [*HEEDING_SIGNALS, sys.executable, "-c", main, str(file)]
    with (folder / log_name).open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
