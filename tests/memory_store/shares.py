"""What the statements of `app.store.shares` do: here all tenants have one weight."""

from __future__ import annotations

from app.store import shares
from tests.memory_store.database import Answer, MemoryConnection, statement
from tests.memory_store.rows import Params


@statement(shares._WEIGHTS)
def _weights(_: MemoryConnection, __: Params) -> Answer:
    return Answer([])
