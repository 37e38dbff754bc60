"""Schedules: lists of moves with whole numbers, drawn from a seed, played, and cut down."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import Final

from tests.simulation.effects import Effect
from tests.simulation.world import World

Move = tuple[str, tuple[int, ...]]
Schedule = list[Move]

ARGUMENTS: Final = {
    "submit": 3, "submit_again": 1, "submit_unstorable": 1, "cancel": 1, "revoke": 2,
    "lose_message": 2, "double_message": 2, "shuffle_messages": 2, "forge_message": 2,
    "redeliver": 1, "flush_redis": 0, "disconnect": 1, "redis_away": 1,
    "postgres_away": 1, "fail_transaction": 3, "fail_sweep": 3, "lose_cancels": 0,
    "kill_worker": 2, "kill_at_ack": 2, "pause_worker": 2, "miss_beats": 2, "drain": 2,
    "start_worker": 1, "kill_engine": 1, "freeze_engine": 2, "lose_reply": 3,
    "start_rescue": 1, "restart_rescue": 1, "go": 2, "stand_still": 1,
    "submit_later": 3, "deploy": 2, "misplace_message": 2, "revoke_unread": 2, "babble": 2,
    "flood": 2,
}  # fmt: skip
"""How many numbers each move takes."""

FAULTS: Final = tuple(
    name
    for name in ARGUMENTS
    if name not in ("submit", "go", "start_worker", "start_rescue", "stand_still")
)
COMPANIONS: Final = {
    "submit_later": ("deploy", "misplace_message"),
    "deploy": ("submit_later", "kill_worker"),
    "babble": ("lose_message",),
}
"""Faults that come to nothing without others."""

MAX_NUMBER: Final = 10_000
CUT_DOWN_S: Final = 20.0


def drawn(seed: int) -> Schedule:
    """The schedule of a seed. A schedule has few kinds of faults, each of them often: that is how
    they meet."""
    chance = random.Random(seed)
    faults = chance.sample(FAULTS, chance.randint(0, 5))
    faults += [other for name in faults for other in COMPANIONS.get(name, ())]
    names = ["submit"] * 4 + ["go"] * 6 + ["start_worker", "start_rescue"] + faults * 2
    moves = chance.choices(names, k=chance.randint(10, 50))
    return [
        (name, tuple(chance.randrange(MAX_NUMBER) for _ in range(ARGUMENTS[name])))
        for name in moves
    ]


@dataclass(frozen=True, slots=True)
class Failure:
    schedule: Schedule
    error: BaseException

    def __str__(self) -> str:
        moves = "\n".join(f"    {move}," for move in self.schedule)
        return f"{type(self.error).__name__}: {self.error}\nplay([\n{moves}\n])"


def play(schedule: Schedule) -> World:
    """Play the moves in a new world, then heal it. Raises what is wrong."""
    world = World()
    for name, numbers in schedule:
        getattr(world, name)(*numbers)
    world.heal()
    return world


def failure_of(schedule: Schedule, seen: Counter[Effect] | None = None) -> Failure | None:
    """What goes wrong, if anything; counts in `seen` what happened."""
    try:
        world = play(schedule)
    except Exception as error:
        return Failure(schedule, error)
    if seen is not None:
        seen.update(world.seen)
    return None


def cut_down(failure: Failure) -> Failure:
    """A schedule as short as leaving out moves makes it that fails with the same kind of error.

    Or what is shortest after `CUT_DOWN_S`: one that never comes to rest takes long to play.
    """
    smallest, until_s = failure, time.monotonic() + CUT_DOWN_S
    for size in (8, 4, 2, 1):
        place = 0
        while place < len(smallest.schedule) and time.monotonic() < until_s:
            moves = smallest.schedule
            shorter = failure_of(moves[:place] + moves[place + size :])
            if shorter is not None and type(shorter.error) is type(failure.error):
                smallest = shorter
            else:
                place += size
    return smallest
