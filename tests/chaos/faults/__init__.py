"""The catalogue; importing a module enters its faults."""

from tests.chaos.faults import (
    broker,
    clients,
    data,
    database,
    deploy,
    engine,
    feeders,
    front_door,
    messages,
    surroundings,
    worker,
)

__all__ = [
    "broker", "clients", "data", "database", "deploy", "engine", "feeders", "front_door",
    "messages", "surroundings", "worker",
]  # fmt: skip
