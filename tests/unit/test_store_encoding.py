"""Records on their way into jsonb."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import GristmillError
from app.jobs import JobState
from app.store.encoding import encode


@dataclass(frozen=True, slots=True)
class Record:
    value: Any
    other: Any = None


@given(
    st.recursive(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])) | st.integers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text("ab\\"), inner),
    )
)
def test_what_json_and_postgres_can_both_hold_is_kept_as_it_is(value: Any) -> None:
    assert json.loads(encode([Record(value)])) == [{"value": value}]


@given(st.text(st.sampled_from('\0\\u0"é\ud800\U0001f33e')))
def test_only_nul_and_lone_surrogates_are_replaced(value: str) -> None:
    expected = value.replace("\0", "\ufffd").replace("\ud800", "?")

    assert json.loads(encode([Record(value)])) == [{"value": expected}]


def test_ids_stamps_money_and_words_are_written_as_postgres_reads_them() -> None:
    id, stamp = UUID(int=7), datetime(2026, 11, 23, 12, 0, 0, 5, tzinfo=UTC)

    rows = json.loads(encode([Record(id, stamp), Record(Decimal("0.000000001"), JobState.QUEUED)]))

    assert rows == [
        {"value": str(id), "other": "2026-11-23T12:00:00.000005+00:00"},
        {"value": "1E-9", "other": "queued"},
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), b"bytes", {1, 2}])
def test_what_json_has_no_word_for_is_refused_without_being_quoted(value: object) -> None:
    with pytest.raises(GristmillError, match=r"as JSON: (Type|Value)Error$"):
        encode([Record(value)])
