"""What every benchmark prints: the machine, a table, and one line of JSON at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from app.engines.device import machine

__all__ = ["machine", "print_json", "print_table", "spread"]


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Texts to the left in the first column, numbers to the right in the others."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, ["-" * width for width in widths], *rows):
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]))


def print_json(bench: str, ratios: Mapping[str, Any], **details: Any) -> None:
    record = {"bench": bench, "machine": machine(), "ratios": ratios, **details}
    print(json.dumps(record), flush=True)


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Smallest to largest."""
    return f"{min(values):.{digits}f}–{max(values):.{digits}f}"
