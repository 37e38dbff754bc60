"""`python -m tests.chaos.soak --hours 0.5 [--seed S] [--out FOLDER]`: random faults for so long.

One world for the whole time. Memory of every part and connections to each server are sampled every
few seconds and drawn at the end; each fault is checked as in `make chaos`. Memory that grows from
the second quarter of the time to the last by more than `MOST_GROWTH` fails.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from matplotlib import pyplot

import tests.chaos.faults  # noqa: F401  # enters the faults
from app.bench.report import print_json
from tests.chaos import report
from tests.chaos.history import History
from tests.chaos.scene import FAULTS, Outcome, play
from tests.chaos.world import World

SAMPLE_S: Final = 3.0
MOST_GROWTH: Final = 1.25
GROWN_BYTES: Final = 32 << 20
"""Growth below this is not looked at."""


@dataclass(slots=True)
class Samples:
    """What was measured over time; every list is as long as `at_s`."""

    at_s: list[float] = field(default_factory=list)
    rss: list[dict[str, int]] = field(default_factory=list)
    connections: list[dict[str, int]] = field(default_factory=list)
    faults: list[tuple[float, int]] = field(default_factory=list)  #: when each began


def main(arguments: Sequence[str]) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = _parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"seed {options.seed}, {options.hours:g} hours", flush=True)
    samples = Samples()
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        World(Path(folder)) as world,
        _sampling(world, samples),
    ):
        outcomes = _play_all(world, samples, options)
    (options.out / "samples.json").write_text(json.dumps(asdict(samples)))
    report.write_html(outcomes, options.out / "report.html", seed=options.seed, commit="soak")
    _plot(samples, options.out / "soak.png")
    growth = {part: round(ratio, 3) for part, ratio in growths(samples).items()}
    print("memory, last quarter over second quarter: ", growth)
    print_json("soak", {**report.totals(outcomes), "growth": max(growth.values(), default=1.0)})
    return 0 if all(each.survived for each in outcomes) and not grown(samples) else 1


def _play_all(world: World, samples: Samples, options: argparse.Namespace) -> list[Outcome]:
    rng = random.Random(options.seed)
    fit = [each for each in FAULTS.values() if not each.needs_fresh_world]
    outcomes: list[Outcome] = []
    ends = time.monotonic() + options.hours * 3600
    (options.out / "history.jsonl").unlink(missing_ok=True)
    with History(options.out / "history.jsonl") as history:
        while time.monotonic() < ends:
            fault = rng.choice(fit)
            samples.faults.append((time.monotonic(), fault.number))
            seed = rng.randrange(1 << 32)
            folder = options.out / "last"
            outcome = play(world, history, fault, seed=seed, jobs=options.jobs, folder=folder)
            report.print_one(outcome)
            outcomes.append(outcome)
            if not outcome.survived:
                kept = options.out / f"failed-{len(outcomes)}-fault-{fault.number}"
                shutil.rmtree(kept, ignore_errors=True)
                folder.rename(kept)
            history.forget()
    return outcomes


@contextmanager
def _sampling(world: World, samples: Samples) -> Iterator[None]:
    ended = threading.Event()
    began = time.monotonic()

    def sample() -> None:
        while not ended.wait(SAMPLE_S):
            samples.at_s.append(time.monotonic() - began)
            samples.rss.append(world.rss())
            samples.connections.append(world.connections())

    thread = threading.Thread(target=sample, name="sampling")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        samples.faults[:] = [(at - began, number) for at, number in samples.faults]


def growths(samples: Samples) -> dict[str, float]:
    """How much more memory each part had in the last quarter of the time than in the second."""
    quarter = max(1, len(samples.rss) // 4)
    parts = {part for each in samples.rss for part in each}

    def usual(part: str, chosen: Sequence[dict[str, int]]) -> float:
        return median([each[part] for each in chosen if part in each] or [0])

    return {
        part: usual(part, samples.rss[-quarter:]) / (before or 1)
        for part in sorted(parts)
        if (before := usual(part, samples.rss[quarter : 2 * quarter])) >= GROWN_BYTES
    }


def grown(samples: Samples) -> dict[str, float]:
    """The parts that grew by too much."""
    return {part: ratio for part, ratio in growths(samples).items() if ratio > MOST_GROWTH}


def _plot(samples: Samples, file: Path) -> None:
    """Memory and connections over time."""
    pyplot.switch_backend("Agg")
    figure, (memory, connections) = pyplot.subplots(
        2, 1, figsize=(10, 7), sharex=True, layout="constrained"
    )
    minutes = [at / 60 for at in samples.at_s]
    _draw(memory, minutes, samples.rss, scale=1 << 20)
    _draw(connections, minutes, samples.connections, scale=1)
    for at, number in samples.faults:
        memory.axvline(at / 60, color="0.85", linewidth=0.8, zorder=0)
        memory.text(at / 60, memory.get_ylim()[1], str(number), fontsize=6, va="bottom")
    memory.set_ylabel("MiB resident; grey: a fault begins")
    connections.set_ylabel("open connections")
    connections.set_xlabel("minutes")
    figure.savefig(file, dpi=120)
    print(f"wrote {file}")


def _draw(
    axes: Any, minutes: Sequence[float], samples: Sequence[dict[str, int]], scale: int
) -> None:
    for name in sorted({name for each in samples for name in each}):
        values = [each.get(name, 0) / scale for each in samples]
        axes.plot(minutes, values, label=name, linewidth=1)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak", description=__doc__)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--jobs", type=int, default=700, help="of each fault")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--out", type=Path, default=Path(".cache/soak"))
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
