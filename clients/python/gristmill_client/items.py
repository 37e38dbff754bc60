"""What is told of each of many things, or what was wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from gristmill_client.errors import GristmillError, error_of

T = TypeVar("T")


def items_of(
    answer: dict[str, Any], count: int, read: Callable[[dict[str, Any]], T]
) -> list[T | GristmillError]:
    """What is told of each of `count` things: what `read` makes of it, or its error.

    Raises `GristmillError` if there is not one item for each.
    """
    try:
        told = answer["items"]
        found = [error_of(item["error"]) if "error" in item else read(item) for item in told]
    except (KeyError, TypeError, ValueError, AttributeError):
        found = []
    if len(found) != count:
        raise GristmillError(f"The API answered without an outcome for each of {count}.")
    return found


def list_of(answer: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The objects that an answer lists. Raises `GristmillError` if there is no such list."""
    told = answer.get(name)
    if isinstance(told, list) and all(isinstance(each, dict) for each in told):
        return told
    raise GristmillError(f"The API answered without a list of {name}.")
