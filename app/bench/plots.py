"""Pictures of results; matplotlib is one of the packages for development."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any


def plot_throughput(rates: Mapping[str, Sequence[float]], file: str) -> None:
    """Output tokens per second of each way, with the spread of its rounds."""
    figure, axes = _canvas(height=0.4 * len(rates) + 1)
    for name, found in rates.items():
        middle = median(found)
        spread = [[middle - min(found)], [max(found) - middle]]
        colour = "tab:orange" if name.startswith("inflight") else "tab:grey"
        axes.barh(name, middle, xerr=spread, color=colour)
    axes.invert_yaxis()
    axes.set_xlabel("output tokens per second")
    _save(figure, file)


def plot_step(
    parts: Mapping[int, Mapping[str, float]], floors: Mapping[int, float], file: str
) -> None:
    """Where the milliseconds of a decode step go, by rows, beside the floor."""
    figure, axes = _canvas(height=4)
    rows = list(parts)
    places = range(len(rows))
    below = [0.0] * len(rows)
    for part in parts[rows[0]]:
        heights = [parts[row][part] for row in rows]
        axes.bar(places, heights, bottom=below, label=part)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.plot(places, [floors[row] for row in rows], "k_", markersize=40, label="floor")
    axes.set_xticks(places, [f"{row} rows" for row in rows])
    axes.set_ylabel("ms per step")
    axes.legend()
    _save(figure, file)


def _canvas(height: float) -> tuple[Any, Any]:
    try:
        from matplotlib import pyplot
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    pyplot.switch_backend("Agg")
    figure, axes = pyplot.subplots(figsize=(8, height), layout="constrained")
    return figure, axes


def _save(figure: Any, file: str) -> None:
    figure.savefig(file, dpi=120)
    print(f"wrote {file}")
