"""Faults 1 and 8 to 14: what goes wrong in the engine process and in the device."""

from __future__ import annotations

import os
import signal

from tests.chaos.scene import Scene, fault


@fault(1, "engine process SIGKILL mid-batch", checks=("I6", "I7"))
def engine_killed(scene: Scene) -> None:
    for _ in range(3):
        part = scene.rng.choice(("worker-1", "worker-2"))
        scene.world.wait_running(part)
        scene.pause(0.0, 0.05)
        if pid := scene.world.engine_pid(part):
            os.kill(pid, signal.SIGKILL)
        scene.pause(0.2, 0.6)
