"""Comparisons of models."""

from __future__ import annotations

from sqlalchemy import Column, Index, Integer, Table, Text, Uuid
from sqlalchemy.dialects.postgresql import JSONB

from app.jobs import Kind
from app.store.tables.columns import Stamp, in_range, metadata, not_negative, one_of

comparisons = Table(
    "comparisons",
    metadata,
    Column("id", Uuid, primary_key=True, comment="A new id for each."),
    Column("made_at", Stamp, nullable=False, comment="Ended."),
    Column("machine", Text, nullable=False, comment="Device and software, in words."),
    Column("kind", Text, nullable=False, comment="Kind of both models."),
    Column("prompts_digest", Text, nullable=False, comment="Hex SHA-256 of the prompts."),
    Column("num_prompts", Integer, nullable=False, comment="How many they were."),
    Column("a", Text, nullable=False, comment="The first model, as it was named."),
    Column("b", Text, nullable=False, comment="The second."),
    Column("a_digest", Text, nullable=False, comment="Hex SHA-256 of the first's settings."),
    Column("b_digest", Text, nullable=False, comment="Hex SHA-256 of the second's."),
    Column(
        "figures", JSONB, nullable=False, comment="What was measured; no prompts and no answers."
    ),
    one_of("kind", Kind),
    in_range("made_at"),
    not_negative("num_prompts"),
    Index("comparisons_by_both", "a_digest", "b_digest", "made_at"),
    comment="One row per run of `gristmill compare`. Kept until they are deleted by hand.",
)
