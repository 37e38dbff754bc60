"""How endpoints, deliveries and events are called outside."""

from __future__ import annotations

from typing import Final
from uuid import UUID

ENDPOINT: Final = "we_"
DELIVERY: Final = "wd_"
EVENT: Final = "evt_"


def name_of(prefix: str, id: UUID) -> str:
    return prefix + id.hex


def id_in(prefix: str, name: str) -> UUID | None:
    """The id in a name that `name_of` made; None in any other text."""
    digits = name.removeprefix(prefix)
    if digits == name or len(digits) != 32:
        return None
    try:
        found = UUID(hex=digits)
    except ValueError:
        return None
    return found if found.hex == digits else None
