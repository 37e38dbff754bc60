"""What is checked of a submission."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from app.errors import RequestError
from app.intake.submit import parse_submission
from app.jobs import EARLIEST, LATEST

BODY = {"prompt": "A grist mill is"}


def test_a_body_alone_is_enough() -> None:
    submission = parse_submission({"body": BODY})

    assert submission.body == BODY
    assert (submission.priority, submission.deadline, submission.metadata) == (0, None, {})


def test_times_are_read_in_any_zone_and_kept_in_utc() -> None:
    submission = parse_submission({"body": BODY, "deadline": "2030-01-01T01:00:00+01:00"})

    assert submission.deadline == datetime(2030, 1, 1, tzinfo=UTC)
    assert submission.deadline.tzinfo is UTC


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("0001-01-01T00:00:00+01:00", EARLIEST),
        ("9999-12-31T23:59:59-05:00", LATEST),
        ("9999-12-31T23:59:59.999999Z", LATEST),
    ],
)
def test_a_time_beyond_what_a_row_can_hold_is_the_last_one_it_can(
    given: str, kept: datetime
) -> None:
    submission = parse_submission({"body": BODY, "not_before": given, "deadline": given})

    assert submission.not_before == submission.deadline == kept


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"body": None}, "body"),
        ({"body": [1]}, "body"),
        ({"priority": -1}, "priority"),
        ({"priority": 10}, "priority"),
        ({"priority": "1"}, "priority"),
        ({"priority": True}, "priority"),
        ({"url": 3}, "url"),
        ({"deadline": "tomorrow"}, "deadline"),
        ({"deadline": 1_900_000_000}, "deadline"),
        ({"deadline": "1900000000"}, "deadline"),
        ({"deadline": "2030-01-01"}, "deadline"),
        ({"deadline": "2030-01-01T00:00:00"}, "deadline"),  # no zone
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"metadata": {"a": "\0"}}, "metadata.a"),
        ({"idempotency_key": ""}, "idempotency_key"),
        ({"idempotency_key": "k" * 256}, "idempotency_key"),
        ({"idempotency_key": "a\0b"}, "idempotency_key"),
        ({"prompt": "hello"}, "prompt"),
    ],
)
def test_a_wrong_field_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_submission({"body": BODY} | fields)

    assert refused.value.param == param


@pytest.mark.parametrize("value", [None, 3, "text", [], [BODY]])
def test_what_is_no_object_is_no_job(value: object) -> None:
    with pytest.raises(RequestError):
        parse_submission(value)
