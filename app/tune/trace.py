"""Traces: when jobs came and how large they were, from a file or made up. Pure but for the file.

A file is CSV with a header. `at_s` has to be there: seconds from any begin, rising. The others may
be left out: `sequences`, `prompt_tokens` (of the longest prompt), `output_tokens` (most allowed).
"""

from __future__ import annotations

import csv
import difflib
import io
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from app.errors import GristmillError
from app.tune.replay import Arrival

COLUMNS: Final = ("at_s", "sequences", "prompt_tokens", "output_tokens")
MOST_S: Final = 1e9
"""Longest time of a trace: 31 years, which nanoseconds hold with ease."""
MOST: Final = {"at_s": 1e15, "sequences": 4_096, "prompt_tokens": 10**9, "output_tokens": 10**9}
MOST_BYTES: Final = 1_000_000_000


class TraceError(GristmillError):
    """The trace cannot be used."""

    code = "trace_error"


def checked(trace: Sequence[Arrival], name: str) -> Sequence[Arrival]:
    """The trace, if there is something to learn from it. Raises `TraceError`."""
    if not trace:
        raise TraceError(f"{name} holds no jobs.")
    if len(trace) == 1:
        raise TraceError(f"{name} holds one job: there is no company to wait for, and no rate.")
    return trace


def from_zero(trace: Sequence[Arrival]) -> list[Arrival]:
    """The same, from the first arrival on."""
    return [replace(job, at_ns=job.at_ns - trace[0].at_ns) for job in trace]


def read(file: Path) -> list[Arrival]:
    """Raises `TraceError` with file and line for what is no trace."""
    try:
        if file.stat().st_size > MOST_BYTES:
            raise TraceError(f"{file} is larger than {MOST_BYTES:,} bytes.")
        text = file.read_text("utf-8-sig")
    except OSError as error:
        raise TraceError(f"{file} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise TraceError(f"{file} is no text in UTF-8; a trace is CSV.") from None
    return list(_rows(text, str(file)))


def _rows(text: str, name: str) -> Iterator[Arrival]:
    lines = csv.reader(io.StringIO(text))
    try:
        header = [column.strip() for column in next(lines, [])]
        _check_header(header, name)
        began_s = before_s = None
        for cells in lines:
            if not any(cell.strip() for cell in cells):
                continue
            where = f"{name} line {lines.line_num}"
            if len(cells) != len(header):
                raise TraceError(f"{where}: {len(cells)} cells under {len(header)} columns.")
            values = {
                column: _number(cell, column, where)
                for column, cell in zip(header, cells, strict=True)
            }
            at_s = values["at_s"]
            if before_s is not None and at_s < before_s:
                raise TraceError(
                    f"{where}: at_s {at_s:g} is before the line above ({before_s:g}); sort the "
                    "file by time."
                )
            began_s, before_s = at_s if began_s is None else began_s, at_s
            if at_s - began_s > MOST_S:
                raise TraceError(f"{where}: at_s is {MOST_S:g} seconds after the first.")
            yield Arrival(
                round((at_s - began_s) * 1e9),
                max(1, int(values.get("sequences", 1))),
                int(values.get("prompt_tokens", 0)),
                int(values.get("output_tokens", 0)),
            )
    except csv.Error as error:
        raise TraceError(f"{name} line {lines.line_num}: {error}.") from None


def _check_header(header: Sequence[str], name: str) -> None:
    if not header:
        raise TraceError(f"{name} is empty; its first line names the columns: {_known()}.")
    for column in header:
        if column not in COLUMNS:
            near = difflib.get_close_matches(column, COLUMNS, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {_known()}."
            raise TraceError(f"{name} line 1: {column or 'an empty name'} is no column; {hint}")
    if len(set(header)) < len(header):
        raise TraceError(f"{name} line 1: a column is there twice.")
    if "at_s" not in header:
        raise TraceError(f"{name} line 1: the column at_s is missing.")


def _known() -> str:
    return ", ".join(COLUMNS)


def _number(cell: str, column: str, where: str) -> float:
    try:
        value = float(cell) if column == "at_s" else int(cell)
    except ValueError:
        wanted = "a number" if column == "at_s" else "a whole number"
        raise TraceError(f"{where}: {column} is not {wanted}.") from None
    if not 0 <= value <= MOST[column]:  # NaN is not, either
        raise TraceError(f"{where}: {column} must be from 0 to {MOST[column]:g}.")
    return value


def write(trace: Iterable[Arrival], file: Path) -> None:
    with file.open("w", newline="") as opened:
        lines = csv.writer(opened)
        lines.writerow(COLUMNS)
        for job in trace:
            lines.writerow((job.at_ns / 1e9, job.rows, job.prompt_tokens, job.output_tokens))


# ── made up ──────────────────────────────────────────────────────────────────────────────────────

SPECS: Final = {
    "constant": "constant:RATE",
    "bursts": "bursts:LOW-HIGH/PERIOD (a tenth of each period at HIGH)",
    "swing": "swing:LOW-HIGH/PERIOD (up and down, by the logarithm)",
    "steps": "steps:LOW-HIGH/PERIOD (five rates, by the logarithm)",
}
_NUMBER: Final = r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?)"
_SPEC: Final = re.compile(rf"([a-z]+):{_NUMBER}(?:-{_NUMBER}/{_NUMBER})?")
PIECES: Final = 200
"""Of a period, in each of which the rate is taken as constant."""
RARE: Final = 0.1


@dataclass(frozen=True, slots=True)
class Traffic:
    """Jobs a second, between `low` and `high`, again and again in `period_s`."""

    shape: str
    low: float
    high: float
    period_s: float

    @classmethod
    def of(cls, spec: str) -> Traffic:
        """`swing:1-100/600`. Raises `TraceError` for what is none."""
        shape = spec.partition(":")[0]
        if shape not in SPECS:
            raise TraceError(f"{spec}: no such traffic; known are {'; '.join(SPECS.values())}.")
        found = _SPEC.fullmatch(spec)
        if found is None or (shape == "constant") != (found[3] is None):
            raise TraceError(f"{spec}: say {SPECS[shape]}.")
        low, high, period_s = float(found[2]), float(found[3] or found[2]), float(found[4] or 1)
        if not 1e-6 <= low <= high <= 1e6:
            raise TraceError(f"{spec}: rates must rise, from 0.000001 to 1,000,000 jobs a second.")
        if not 1e-3 <= period_s <= MOST_S:
            raise TraceError(f"{spec}: a period must be from 0.001 to {MOST_S:g} seconds.")
        traffic = cls(shape, low, high, period_s)
        if (
            shape != "constant"
            and sum(map(traffic.rate, traffic.pieces_s)) / PIECES < RARE / period_s
        ):
            raise TraceError(f"{spec}: fewer than {RARE:g} jobs come in a period.")
        return traffic

    @property
    def pieces_s(self) -> list[float]:
        return [self.period_s * place / PIECES for place in range(PIECES)]

    def rate(self, at_s: float) -> float:
        """Jobs a second at a second of the trace."""
        phase = at_s / self.period_s % 1
        match self.shape:
            case "bursts":
                up = float(phase >= 0.9)
            case "swing":
                up = 0.5 - 0.5 * math.cos(math.tau * phase)
            case "steps":
                up = int(phase * 5) / 4
            case _:
                up = 0.0
        return self.low * math.pow(self.high / self.low, up)


def synthetic(spec: str, jobs: int, seed: int = 0, tokens: int = 0) -> list[Arrival]:
    """So many jobs that come independently of each other, at the rates of a `Traffic`, each with an
    answer of so many tokens."""
    traffic = Traffic.of(spec)
    piece_s = traffic.period_s / PIECES if traffic.shape != "constant" else math.inf
    chance, at_s, trace = random.Random(seed), 0.0, []
    for _ in range(jobs):
        # Piece by piece, so that a gap of a slow phase does not jump over the fast one behind it.
        left = chance.expovariate(1.0)
        while left > (rate := traffic.rate(at_s)) * piece_s:
            left -= rate * piece_s
            at_s += piece_s
        at_s += left / rate
        if at_s > MOST_S:
            raise TraceError(f"{spec}: {jobs} jobs would take more than {MOST_S:g} seconds.")
        trace.append(Arrival(round(at_s * 1e9), output_tokens=tokens))
    return trace
