"""Faults 2 to 7: the worker process is killed, frozen and asked to end."""

from __future__ import annotations

import signal

from tests.chaos.scene import Scene, fault


@fault(2, "worker and engine process SIGKILL", checks=("I7",))
def group_killed(scene: Scene) -> None:
    for part in ("worker-1", "worker-2"):
        scene.world.wait_running(part)
        scene.world.kill_group(part, signal.SIGKILL)
