"""`python -m tests.chaos [--faults 1,5,20-26] [--jobs 20000] [--seed S] [--out FOLDER]`

Runs the faults of the catalogue against real processes, one after the other, checks the invariants
after each, and writes a report. Exit status 1 if one was not survived.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import tests.chaos.faults  # noqa: F401  # enters the faults
from tests.chaos import report
from tests.chaos.history import History
from tests.chaos.scene import FAULTS, Fault, Outcome, play
from tests.chaos.world import World


def main(arguments: Sequence[str]) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that all is stopped in order
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))  # a poll storm takes many
    options = _parser().parse_args(arguments)
    chosen = [FAULTS[number] for number in options.faults]
    commit = _commit()
    print(f"seed {options.seed}, commit {commit}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = -(-options.jobs // len(chosen))
    outcomes = run(chosen, seed=options.seed, jobs=jobs, out=options.out)
    report.write_html(outcomes, options.out / "report.html", seed=options.seed, commit=commit)
    report.print_all(outcomes)
    survived = not any(outcome.violations for outcome in outcomes)
    if not survived:
        failed = ",".join(str(each.number) for each in outcomes if each.violations)
        print(
            f"again: python -m tests.chaos --faults {failed} --seed {options.seed} "
            f"--jobs {jobs * failed.count(',') + jobs}  (commit {commit})",
            file=sys.stderr,
        )
    return 0 if survived else 1


def run(faults: Iterable[Fault], *, seed: int, jobs: int, out: Path) -> list[Outcome]:
    """Play faults in one world, or in fresh ones where they ask for it or one was not survived."""
    outcomes: list[Outcome] = []
    (out / "history.jsonl").unlink(missing_ok=True)
    with History(out / "history.jsonl") as history, ExitStack() as held:
        world: World | None = None
        for fault in faults:
            if world is None or fault.needs_fresh_world:
                held.close()
                folder = held.enter_context(tempfile.TemporaryDirectory(prefix="chaos-"))
                world = held.enter_context(World(Path(folder)))
            folder_of_fault = out / f"fault-{fault.number:02}"
            outcome = play(world, history, fault, seed=seed, jobs=jobs, folder=folder_of_fault)
            report.print_one(outcome)
            outcomes.append(outcome)
            if fault.needs_fresh_world or not outcome.survived:
                _keep_logs(world, folder_of_fault)
                world = None
        held.close()
    return outcomes


def _keep_logs(world: World, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in world.logs.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--faults", type=_numbers, default=sorted(FAULTS))
    parser.add_argument("--jobs", type=int, default=21_000, help="over all faults")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--out", type=Path, default=Path(".cache/chaos"))
    return parser


def _numbers(text: str) -> list[int]:
    """1,5,20-26"""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    if unknown := set(found) - FAULTS.keys():
        raise argparse.ArgumentTypeError(f"no such fault: {sorted(unknown)}")
    return found


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], check=False, capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
