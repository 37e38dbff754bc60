"""Pages of lists, as OpenAI's clients know them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def page_of(found: Sequence[T], limit: int, told: Callable[[T], Any]) -> dict[str, Any]:
    """The fields of a page of up to `limit`, of which one more was looked for."""
    shown = [told(each) for each in found[:limit]]
    return {
        "data": shown,
        "first_id": shown[0].id if shown else None,
        "last_id": shown[-1].id if shown else None,
        "has_more": len(found) > limit,
    }
