"""What the statements of `app.store.usage` do: here nobody sums what jobs used."""

from __future__ import annotations

from app.store import usage
from tests.memory_store.database import Answer, MemoryConnection, statement
from tests.memory_store.rows import Params


def _fold(_: MemoryConnection, __: Params) -> Answer:
    return Answer([{"count": 0}])


for each in usage._FOLDS:
    statement(each)(_fold)
