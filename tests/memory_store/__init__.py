"""A Postgres in memory for the simulation: the store's own functions run on it unchanged."""

from tests.memory_store import (
    claims,
    delivery,
    retention,
    shares,
    submissions,
    sweeps,
    usage,
    workers,
)
from tests.memory_store.database import MemoryConnection, MemoryDatabase
from tests.memory_store.rows import KEYS, Row

__all__ = [
    "KEYS", "MemoryConnection", "MemoryDatabase", "Row",
    "claims", "delivery", "retention", "shares",
    "submissions", "sweeps", "usage", "workers",
]  # fmt: skip
