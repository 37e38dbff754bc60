"""Prices: a table that only grows."""

from __future__ import annotations

from sqlalchemy import Column, Table, Text

from app.store.tables.columns import Money, Stamp, in_range, metadata, not_negative

prices = Table(
    "prices",
    metadata,
    Column("id", Text, primary_key=True, comment="Its name in prices.toml."),
    Column("per_device_hour", Money, nullable=False, comment="Money per device and hour."),
    Column(
        "per_million_input_tokens",
        Money,
        nullable=False,
        comment="Tariff: money for a million tokens of prompts that were not cached.",
    ),
    Column(
        "per_million_cached_input_tokens",
        Money,
        nullable=False,
        comment="Tariff: money for a million tokens of prompts that were cached.",
    ),
    Column(
        "per_million_output_tokens",
        Money,
        nullable=False,
        comment="Tariff: money for a million tokens of answers.",
    ),
    Column(
        "batch_discount", Money, nullable=False, comment="Part of the tariff that is taken off."
    ),
    Column("currency", Text, nullable=False, comment="ISO 4217 code."),
    Column("device", Text, comment="Name that the prices of one device share, if any."),
    Column("valid_from", Stamp, nullable=False, comment="As its file said; else first written."),
    Column("valid_until", Stamp, comment="As its file said; null is until another one."),
    Column("note", Text, nullable=False, comment="What it is made of."),
    in_range("valid_from", "valid_until"),
    not_negative(
        "per_device_hour",
        "per_million_input_tokens",
        "per_million_cached_input_tokens",
        "per_million_output_tokens",
        "batch_discount",
        "1 - batch_discount",
    ),
    comment="One row per price that was ever in force. It only grows: no row is changed.",
)
