"""`python -m tests.simulation --schedules N --seed S`: play the schedules of many seeds."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter

from tests.simulation.effects import Effect
from tests.simulation.schedules import cut_down, drawn, failure_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    began, num_moves, seen = time.monotonic(), 0, Counter[Effect]()
    for number, seed in enumerate(range(given.seed, given.seed + given.schedules), start=1):
        schedule = drawn(seed)
        num_moves += len(schedule)
        if failure := failure_of(schedule, seen):
            print(f"seed {seed} fails; cut down:\n{cut_down(failure)}")  # noqa: T201
            return 1
        if number % 1_000 == 0 or number == given.schedules:
            per_minute = 60 * number / (time.monotonic() - began)
            print(  # noqa: T201
                f"{number} schedules, {num_moves} moves, {per_minute:.0f} schedules a minute",
                flush=True,
            )
    for effect in Effect:
        each = 1_000 * seen[effect] / given.schedules
        print(f"{each:10.1f} per 1,000 schedules: {effect}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
