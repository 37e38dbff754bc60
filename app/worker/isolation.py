"""Who of a group is to blame: what fails for all of it is tried again by halves.

One statement, one parse or one call does for many jobs. Data that it cannot stand belongs to one of
them, and the others are not to suffer for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from app.errors import GristmillError, NotStorable, RequestError
from app.threads import place_of

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

_OF_DATA: Final = (NotStorable, RequestError)
"""What says that data is wrong. All else is a server that is away, or a bug: nobody's fault here,
and jobs are not to be failed for it one after the other."""

ODD: Final = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError)
"""What data can raise in code that looks at one job alone: there it is this job's affair."""


def by_halves(
    items: Sequence[T], act: Callable[[Sequence[T]], R], refuse: Callable[[T, Exception], object]
) -> list[R]:
    """Do `act` for a group; if that fails for its data, for its halves, and so on.

    Returns the answers, one for each part that went through; `refuse` gets each item that fails
    alone, with its error. `act` must be safe to repeat: others of its errors are passed on, and the
    whole may then be called again.
    """
    if not items:
        return []
    try:
        return [act(items)]
    except _OF_DATA as error:
        if len(items) == 1:
            refuse(items[0], error)
            return []
    middle = len(items) // 2
    return [*by_halves(items[:middle], act, refuse), *by_halves(items[middle:], act, refuse)]


def said(error: Exception) -> str:
    """What an error is, without data: our own errors never quote any, others may."""
    return str(error) if isinstance(error, GristmillError) else place_of(error)
