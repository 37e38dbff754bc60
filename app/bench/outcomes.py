"""What the client answers for each of many, where only good answers are of use."""

from __future__ import annotations

from typing import TypeVar

from gristmill_client import GristmillError

T = TypeVar("T")


def good(outcome: T | GristmillError) -> T:
    """The same, unless it is an error, which is raised."""
    if isinstance(outcome, GristmillError):
        raise outcome
    return outcome
