"""One item that the store refuses keeps out nobody else of its group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from sqlalchemy import Connection

from app.errors import NotStorable
from app.store.translation import translated_errors

__all__ = ["Connection", "Write", "apart"]

T = TypeVar("T")
R = TypeVar("R")

Write = Callable[[Connection, Sequence[T]], Sequence[R]]
"""A statement for a group; one answer for each item, in order."""


def apart(write: Write[T, R], connection: Connection, items: Sequence[T]) -> list[R | NotStorable]:
    """Write by halves in one transaction, each half undone by itself if the store refuses it."""
    try:
        with translated_errors(), connection.begin_nested():
            return list(write(connection, items))
    except NotStorable as error:
        if len(items) == 1:
            return [error]
        half = len(items) // 2
        return [
            answer
            for part in (items[:half], items[half:])
            for answer in apart(write, connection, part)
        ]
