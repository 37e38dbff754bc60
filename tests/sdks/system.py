"""A whole system, for clients that know nothing of it but its address."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.config.file import load
from app.local.supervisor import System
from tests.pages import ROOT


@contextmanager
def running_system(*, stubs: bool = True) -> Iterator[str]:
    """Its URL. Its models are stubs, or those of the project's own configuration."""
    scratch = ROOT / ".cache" / "tmp"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        for file in ("models.toml", "prices.toml"):
            (folder / file).write_text((ROOT / "configs" / file).read_text())
        shipped = load(ROOT / "configs" / "default.toml", {}).settings
        lines = [f'cache_dir = "{folder / "cache"}"', "api.port = 0", "flower.port = 0"]
        if stubs:
            lines += [f'models."{model}".engine = "stub"' for model in shipped.models]
        (folder / "settings.toml").write_text("\n".join(lines))
        for variable in [each for each in os.environ if each.startswith("GRISTMILL_")]:
            del os.environ[variable]
        with System(load(folder / "settings.toml"), tell=lambda _: None) as system:
            yield system.settings.api.url
