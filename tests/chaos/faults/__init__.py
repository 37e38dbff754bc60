"""The catalogue; importing a module enters its faults."""

from tests.chaos.faults import broker, database, engine, messages, worker

__all__ = ["broker", "database", "engine", "messages", "worker"]
