"""The energy counters of the host's processors, RAPL, as Linux shows them in files.

They count microjoules, for a whole package each, whoever computes on it; memory has counters of
its own on some. Since 2020 most kernels let only root read them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from app.books.energy import NJ_PER_UJ
from app.worker.energy.counter import Unusable

POWERCAP: Final = Path("/sys/class/powercap")
BOUNDARY: Final = "cpu packages"


class RaplCounter:
    """The counter of one zone: a package, or its memory."""

    def __init__(self, zone: Path) -> None:
        """Raises `Unusable`."""
        self._energy = zone / "energy_uj"
        try:
            self._energy.read_bytes()
            self.wraps_at_nj: int | None = _number(zone / "max_energy_range_uj") * NJ_PER_UJ
        except PermissionError:
            raise Unusable(f"only root may read {self._energy}") from None
        except (OSError, ValueError) as error:
            raise Unusable(f"{zone} cannot be read ({type(error).__name__})") from None

    def read(self) -> int | None:
        try:
            return _number(self._energy) * NJ_PER_UJ
        except (OSError, ValueError):
            return None


def rapl_counters(folder: Path | None = None) -> tuple[RaplCounter, ...]:
    """One for each package and its memory. Raises `Unusable` if there are none, or if one cannot
    be read: a part would pass for the whole."""
    folder = folder or POWERCAP
    zones = sorted(folder.glob("intel-rapl:*"))  # AMD's are called so, too
    counted = [zone for zone in zones if _name(zone).startswith(("package", "dram"))]
    if not counted:
        raise Unusable(f"{folder} shows no processor's counter")
    return tuple(map(RaplCounter, counted))


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""


def _number(file: Path) -> int:
    value = int(file.read_text())
    if value < 0:
        raise ValueError
    return value
