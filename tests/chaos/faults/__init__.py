"""The catalogue; importing a module enters its faults."""

from tests.chaos.faults import broker, clients, database, deploy, engine, messages, worker

__all__ = ["broker", "clients", "database", "deploy", "engine", "messages", "worker"]
