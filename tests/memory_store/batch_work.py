"""What the statements of `app.store.batch_work` that rescue makes do: here are no batches."""

from __future__ import annotations

from app.store import batch_work
from tests.memory_store.database import Answer, MemoryConnection, statement
from tests.memory_store.rows import Params


def _nothing(_: MemoryConnection, __: Params) -> Answer:
    return Answer([], rowcount=0)


for each in (batch_work._OLD_LINES, batch_work._OLD):
    statement(each)(_nothing)
