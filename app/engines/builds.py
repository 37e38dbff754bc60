"""Where engines keep what they compile for this machine, from one start to the next."""

from __future__ import annotations

import os
from pathlib import Path

_chosen: list[Path] = []


def keep_in(folder: Path) -> None:
    """For this process; before its first engine."""
    _chosen[:] = [folder]
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))  # else below HOME


def chosen() -> Path | None:
    return _chosen[0] if _chosen else None
