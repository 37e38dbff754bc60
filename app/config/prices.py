"""Prices: which one is valid when, and what is wrong with a list of them. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime
from itertools import pairwise

from app.config.settings import PriceSettings, Settings
from app.errors import ConfigError

Prices = Mapping[str, PriceSettings]


def problems(prices: Prices) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong with periods and names: a setting and a sentence each."""
    for id_, price in prices.items():
        if price.device in prices:
            yield ("prices", id_, "device"), f"is the id of a price, too: {price.device}."
        if price.valid_until and price.valid_until <= (price.valid_from or date.min):
            yield ("prices", id_, "valid_until"), "must be later than valid_from."
    for of_device in _by_device(prices).values():
        for first, second in pairwise(of_device):
            began, begins = (prices[id_].valid_from for id_ in (first, second))
            until = prices[first].valid_until
            if began == begins or (until and begins and until > begins):
                yield (
                    ("prices", second, "valid_from" if begins else "device"),
                    f"overlaps with {first} ({prices[first].where}): a device has one price at a "
                    "time.",
                )


def _by_device(prices: Prices) -> dict[str, list[str]]:
    """Ids by device, in the order in which they become valid."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for id_ in sorted(prices, key=lambda id_: prices[id_].valid_from or date.min):
        if device := prices[id_].device:
            found[device].append(id_)
    return found


def price_of_worker(settings: Settings, today: date) -> str | None:
    """The id of the price that a worker which starts today takes; None if it has none.

    Raises `ConfigError` if none of those that are meant is valid.
    """
    name, prices = settings.worker.price, settings.prices
    if not (name and prices):
        return None
    ids = [name] if name in prices else _by_device(prices).get(name, [])
    for id_ in reversed(ids):
        price = prices[id_]
        if (price.valid_from or date.min) <= today:
            if price.valid_until is None or today < price.valid_until:
                return id_
            break
    where = prices[ids[-1]].where if ids else "prices.toml"
    raise ConfigError(f"{where}: no price {name} (worker.price) is valid on {today}.")


def price_id_of(settings: Settings, model: str) -> str | None:
    """The id of the price that jobs of a model have today; None if there is none.

    It is that of this process's settings: a worker elsewhere may have another.
    """
    found = settings.models.get(model)
    if found and found.price:
        return found.price
    try:
        return price_of_worker(settings, datetime.now(UTC).date())
    except ConfigError:
        return None
