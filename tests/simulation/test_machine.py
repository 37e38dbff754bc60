"""The same moves, chosen and cut down by hypothesis, which also prints how to play them again."""

from __future__ import annotations

import logging

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from tests.simulation.schedules import ARGUMENTS, FAULTS
from tests.simulation.world import World

SMALL = st.integers(0, 30)
LARGE = st.integers(0, 299)


class WorldOfFaults(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        logging.disable(logging.CRITICAL)
        self.world = World()

    @rule(prompt=SMALL, way=SMALL, times=SMALL)
    def submit(self, prompt: int, way: int, times: int) -> None:
        self.world.submit(prompt, way, times)

    @rule(steps=LARGE, seed=SMALL)
    def go(self, steps: int, seed: int) -> None:
        self.world.go(steps, seed)

    @rule(fault=st.sampled_from(FAULTS), place=SMALL, size=LARGE, more=SMALL)
    def fault(self, fault: str, place: int, size: int, more: int) -> None:
        getattr(self.world, fault)(*(place, size, more)[: ARGUMENTS[fault]])

    @rule(place=SMALL)
    def start_again(self, place: int) -> None:
        self.world.start_worker(place)
        self.world.start_rescue(place)

    @rule(tenths=SMALL)
    def stand_still(self, tenths: int) -> None:
        self.world.stand_still(tenths)

    def teardown(self) -> None:
        try:
            self.world.heal()
        finally:
            logging.disable(logging.NOTSET)


WorldOfFaults.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestWorldOfFaults = WorldOfFaults.TestCase
