"""The catalogue; importing a module enters its faults."""

from tests.chaos.faults import engine, worker

__all__ = ["engine", "worker"]
