"""Which share of the devices each tenant has."""

from __future__ import annotations

from typing import Final

from sqlalchemy import Connection, text

# Tenants whose weight is not that of all others.
_WEIGHTS: Final = text("SELECT name, weight FROM tenants WHERE weight <> 1")


def weights(connection: Connection) -> dict[str, float]:
    """The weights of tenants; of those that are left out it is 1."""
    return {name: float(weight) for name, weight in connection.execute(_WEIGHTS)}
