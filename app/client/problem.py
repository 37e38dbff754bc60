"""From the problem documents of the API to the errors of `app.errors`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

from app import errors
from app.errors import GristmillError, RequestError

T = TypeVar("T")

_KINDS: Final = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, GristmillError)
}


def error_of(problem: dict[str, Any]) -> GristmillError:
    """The error that a problem document tells of. Raises `KeyError` if it is none."""
    kind = _KINDS.get(problem["code"], GristmillError)
    if issubclass(kind, RequestError):
        return kind(problem["detail"], param=problem.get("param"))
    return kind(problem["detail"])


def items_of(
    answer: dict[str, Any], count: int, read: Callable[[dict[str, Any]], T]
) -> list[T | GristmillError]:
    """What is told of each of `count` things: what `read` makes of it, or its error.

    Raises `GristmillError` if there is not one item for each.
    """
    try:
        told = answer["items"]
        found = [error_of(item["error"]) if "error" in item else read(item) for item in told]
    except (KeyError, TypeError, ValueError):
        found = []
    if len(found) != count:
        raise GristmillError(f"The API answered without an outcome for each of {count}.")
    return found
