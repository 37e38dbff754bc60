"""Prices are kept for good, and one that was edited is refused."""

from __future__ import annotations

import pytest
from sqlalchemy import text

from app.config.settings import PriceSettings
from app.errors import ConfigError, GristmillError
from app.store import prices
from app.store.database import Database


def price(**given: object) -> PriceSettings:
    made = PriceSettings.model_validate({"per_device_hour": "0.08", "currency": "USD"} | given)
    made._where = "prices.toml line 7"
    return made


def keep(database: Database, **given: PriceSettings) -> None:
    with database.begin() as connection:
        prices.keep(connection, given)


def ids(database: Database) -> list[str]:
    with database.begin() as connection:
        return list(connection.scalars(text("SELECT id FROM prices ORDER BY id")))


def test_prices_are_added_and_may_be_written_again(database: Database) -> None:
    keep(database, cpu=price())
    keep(database, cpu=price(note="The same.", valid_from="2026-01-01"), gpu=price())

    assert ids(database) == ["cpu", "gpu"]


@pytest.mark.parametrize(
    ("edited", "said"),
    [
        ({"per_device_hour": "0.09"}, "per_device_hour is 0.09, and was 0.080000000 when"),
        ({"currency": "EUR"}, "currency is EUR, and was USD when"),
        ({"per_million_output_tokens": "1"}, "per_million_output_tokens is 1, and was 0"),
        ({"per_million_cached_input_tokens": "1"}, "cached_input_tokens is 1, and was 0"),
        ({"batch_discount": "0.5"}, "batch_discount is 0.5, and was 0"),
    ],
)
def test_a_price_that_was_edited_is_refused_with_file_and_line_and_nothing_is_written(
    database: Database, edited: dict[str, str], said: str
) -> None:
    keep(database, cpu=price())

    with pytest.raises(ConfigError) as caught:
        keep(database, cpu=price(**edited), gpu=price())

    assert caught.value.message.startswith("prices.toml line 7: prices.cpu.")
    assert said in caught.value.message
    assert ids(database) == ["cpu"]


@pytest.mark.parametrize("change", ["UPDATE prices SET per_device_hour = 1", "DELETE FROM prices"])
def test_nobody_changes_a_price(database: Database, change: str) -> None:
    keep(database, cpu=price())

    with pytest.raises(GristmillError), database.begin() as connection:
        connection.execute(text(change))
