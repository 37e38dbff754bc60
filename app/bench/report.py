"""What every benchmark prints: the machine, a table, and one line of JSON at the end."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def machine() -> str:
    """The device and its software, in words."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{device}; torch {torch.__version__}; Python {platform.python_version()}"


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Texts to the left in the first column, numbers to the right in the others."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, ["-" * width for width in widths], *rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]))


def print_json(bench: str, ratios: Mapping[str, Any], **details: Any) -> None:
    record = {"bench": bench, "machine": machine(), "ratios": ratios, **details}
    print(json.dumps(record), flush=True)


def spread(values: Sequence[float]) -> str:
    """Smallest to largest."""
    return f"{min(values):.0f}–{max(values):.0f}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
