"""Queues and the Redis lists that they are made of, by name."""

from __future__ import annotations

from bisect import bisect_right
from typing import Final

from app.config.settings import Settings

PRIORITY_STEPS: Final = (0, 3, 6, 9)
"""Kombu's own: a queue is one list per step, and a message goes to the last step not above it."""


def queue_name(model: str) -> str:
    return f"gristmill.{model}"


def priority_step(priority: int) -> int:
    """The place in `PRIORITY_STEPS` of the list for messages of this priority."""
    return bisect_right(PRIORITY_STEPS, priority) - 1


def list_key(queue: str, priority: int = 0) -> str:
    """The Redis list that holds a queue's messages of this priority."""
    step = PRIORITY_STEPS[priority_step(priority)]
    return f"{queue}\x06\x16{step}" if step else queue


def served_models(settings: Settings) -> tuple[str, ...]:
    """The models that a worker with these settings takes messages for."""
    return settings.worker.models or tuple(settings.models)
