"""Fault 37: what feeds batches, tells of ends and takes calls is killed."""

from __future__ import annotations

import signal
from functools import partial
from typing import Final

from tests.chaos.scene import Scene, fault
from tests.chaos.world import eventually

KILLED: Final = ("rescue", "hooks", "api")
ROUNDS: Final = 2


@fault(37, "API, rescue and hooks SIGKILL in turns, as batches run", extra_s=5.0, ends=KILLED)
def killed_beside_workers(scene: Scene) -> None:
    for part in KILLED * ROUNDS:
        scene.pause(0.5, 2.0)
        before = scene.world.restarts[part]
        scene.world.kill_group(part, signal.SIGKILL)
        eventually(partial(_is_again, scene, part, before), 60, f"{part} up")


def _is_again(scene: Scene, part: str, before: int) -> bool:
    return scene.world.restarts[part] > before and scene.world.is_ready(part)
