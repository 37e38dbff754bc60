"""Ids as they are called outside: a prefix that says of what, and the 32 hex digits of a UUID."""

from __future__ import annotations

from uuid import UUID


def name_of(prefix: str, id: UUID) -> str:
    return prefix + id.hex


def id_in(prefix: str, name: str) -> UUID | None:
    """The id in a name that `name_of` made; None in any other text."""
    try:
        found = UUID(hex=name.removeprefix(prefix))
    except ValueError:
        return None
    return found if name_of(prefix, found) == name else None
