"""Lines of batches: rows of a file from any place on, requests in them, and how they are told."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.batches import Door, LineOutcome
from app.errors import StorageUnavailable
from app.intake.batches import lines, told
from app.intake.batches.input_file import Row, rows
from app.intake.batches.lines import WrongLine
from app.intake.batches.scan import Scan
from app.requests.bodies import Url
from app.store.batch_lines import EndedLine

GOOD = {
    "custom_id": "one",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "stub", "messages": [{"role": "user", "content": "x"}]},
}


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=30).filter(bytes.strip).map(lambda raw: raw.replace(b"\n", b" ")),
            st.text(" \t\r\v\f", max_size=20).map(str.encode),
        ),
        max_size=20,
    ),
    st.booleans(),
    st.integers(1, 40),
    st.integers(0, 20),
)
def test_rows_are_those_of_the_file_wherever_one_begins(
    given: list[bytes], has_end: bool, part: int, skipped: int
) -> None:
    data = b"\n".join(given) + (b"\n" if has_end and given else b"")
    expected = [
        (number, raw if len(raw) <= 20 else None)
        for number, raw in enumerate(data.split(b"\n"), 1)
        if raw.strip() or len(raw) > 20
    ]

    def read(at: int, length: int) -> bytes:
        return data[at : at + length]

    def found(start: int, number: int) -> list[Any]:
        return list(rows(read, len(data), start=start, number=number, longest=20, part=part))

    def told(found: list[Row]) -> list[Any]:
        return [(row.number, row.raw) for row in found if not row.is_blank]

    whole = found(0, 1)
    assert told(whole) == expected
    if skipped < len(whole):
        row = whole[skipped]
        assert told(found(row.end, row.number + 1)) == told(whole[skipped + 1 :])


def test_a_file_that_is_shorter_than_it_should_be_is_no_end() -> None:
    with pytest.raises(StorageUnavailable):
        list(rows(lambda at, length: b"", 10, start=0, number=1, longest=10))


def scanned(*rows_of: bytes | dict[str, Any], door: Door = Door.OPENAI, most: int = 100) -> Scan:
    data = b"\n".join(
        each if isinstance(each, bytes) else json.dumps(each).encode() for each in rows_of
    )
    scan = Scan(
        door,
        Url.CHAT,
        lambda url, model: model.startswith("stub"),
        most,
        rows(
            lambda at, length: data[at : at + length],
            len(data),
            start=0,
            number=1,
            longest=10_000,
        ),
    )
    while not scan.go_on():
        pass
    return scan


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


def body(**given: Any) -> dict[str, Any]:
    return GOOD | {"body": {**GOOD["body"], **given}}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("row", "code", "param", "message"),
    [
        (b"{", "invalid_json_line", None, "This line is not parseable as valid JSON."),
        (b"\xff\xfe", "invalid_json_line", None, None),
        (b"[]", "invalid_json_line", None, None),
        (b'"\\ud800"', "invalid_json_line", None, None),
        (b"[" * 5_000, "invalid_json_line", None, None),
        *(
            (
                without(name),
                "missing_required_parameter",
                name,
                f"Missing required parameter: '{name}'.",
            )
            for name in ("custom_id", "method", "url", "body")
        ),
        (GOOD | {"custom_id": 7}, "invalid_type", "custom_id", None),
        (GOOD | {"custom_id": ""}, "invalid_value", "custom_id", None),
        (GOOD | {"custom_id": "x" * 513}, "invalid_value", "custom_id", None),
        (GOOD | {"custom_id": "\0"}, "invalid_value", "custom_id", None),
        (GOOD | {"method": "GET"}, "invalid_method", "method", None),
        (
            GOOD | {"url": "/v1/embeddings"},
            "invalid_url",
            "url",
            "The URL provided for this request does not match the batch endpoint.",
        ),
        (GOOD | {"url": 5}, "invalid_url", "url", None),
        (GOOD | {"body": "x"}, "invalid_type", "body", None),
        (
            body(stream=True),
            "streaming_unsupported",
            "body.stream",
            "Chat Completions: Streaming is not supported in the Batch API.",
        ),
        (body(model=None), "invalid_request", "body.model", "Model parameter is required."),
        (body(model=3), "invalid_type", "body.model", None),
        (
            body(model="gpt-9"),
            "model_not_found",
            "body.model",
            "The provided model 'gpt-9' is not supported by the Batch API.",
        ),
        (
            body(messages=None),
            "invalid_request",
            "body.messages",
            "Messages parameter is required.",
        ),
        (b"x" * 20_000, "request_too_large", None, None),
    ],
)
def test_what_is_wrong_with_a_line_is_told_as_openai_does(
    row: bytes | dict[str, Any], code: str, param: str | None, message: str | None
) -> None:
    scan = scanned(GOOD, b"  ", row)

    [error] = scan.errors
    assert (error.code, error.param, error.line) == (code, param, 3)
    assert message is None or error.message == message
    assert scan.total == 2


def test_a_line_of_a_batch_of_messages_may_not_ask_for_a_stream_either() -> None:
    params = {"model": "stub", "max_tokens": 1, "messages": [], "stream": True}
    raw = json.dumps({"custom_id": "one", "params": params}).encode()

    with pytest.raises(WrongLine, match="Messages: Streaming is not supported"):
        lines.parse(raw, Door.ANTHROPIC, Url.MESSAGES)


def test_an_id_that_comes_again_is_an_error_and_so_is_no_line_and_too_many() -> None:
    [twice] = scanned(GOOD, GOOD | {"custom_id": "two"}, GOOD).errors
    assert (twice.code, twice.line, twice.param) == ("duplicate_custom_id", 3, "custom_id")
    for nothing in ((), (b"",), (b"  ", b"")):
        [empty] = scanned(*nothing).errors
        assert (empty.code, empty.line) == ("empty_file", None)
    many = [GOOD | {"custom_id": str(n)} for n in range(4)]
    assert scanned(*many, most=4).errors == []
    [over] = scanned(*many, most=3).errors
    assert (over.code, over.line) == ("too_many_tasks", None)


def test_a_batch_has_the_model_that_all_its_lines_name() -> None:
    two = GOOD | {"custom_id": "two"}
    assert scanned(GOOD, two).model == "stub"
    other = {**two, "body": {**GOOD["body"], "model": "stub-2"}}  # type: ignore[dict-item]
    mixed = scanned(GOOD, other)
    assert mixed.model is None and mixed.errors == []


@given(st.binary(max_size=200))
def test_no_row_is_more_than_a_wrong_line(raw: bytes) -> None:
    for door in Door:
        with pytest.raises(WrongLine):
            lines.parse(raw, door, Url.CHAT)
        assert isinstance(lines.custom_id_of(raw), str)


def ended(**given: Any) -> EndedLine:
    defaults: dict[str, Any] = {
        "number": 3,
        "custom_id": 'a"\u2028b',
        "job_id": UUID(int=5),
        "outcome": LineOutcome.SUCCEEDED,
        "place": 1,
        "error": None,
        "response": '{"id": "chatcmpl-1"}',
        "error_code": None,
        "error_message": None,
    }
    return EndedLine(**defaults | given)


LINES = {
    "answered": ended(),
    "refused": ended(
        outcome=LineOutcome.ERRORED,
        job_id=None,
        response=None,
        error={"status": 400, "code": "invalid_request", "message": "no", "param": "stop"},
    ),
    "failed": ended(
        outcome=LineOutcome.ERRORED, error_code="engine_crash", error_message="It died."
    ),
    "expired": ended(outcome=LineOutcome.EXPIRED, response=None, job_id=None),
    "cancelled": ended(outcome=LineOutcome.CANCELLED, response=None),
    "removed": ended(response=None),
}


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_line_is_one_row_of_json_with_its_own_id(line: EndedLine) -> None:
    for door in Door:
        raw = told.line_of(door, line)
        assert raw.count(b"\n") == 1 and raw.endswith(b"\n")
        assert json.loads(raw)["custom_id"] == line.custom_id


def test_an_answer_is_told_with_its_status_and_no_error() -> None:
    line = json.loads(told.line_of(Door.OPENAI, LINES["answered"]))

    assert line["id"] == f"batch_req_{UUID(int=5).hex}" and line["error"] is None
    assert line["response"]["status_code"] == 200
    assert line["response"]["body"] == {"id": "chatcmpl-1"}


def test_what_was_asked_and_not_answered_is_told_both_ways() -> None:
    refused = json.loads(told.line_of(Door.OPENAI, LINES["refused"]))
    failed = json.loads(told.line_of(Door.OPENAI, LINES["failed"]))

    assert refused["response"]["status_code"] == 400
    assert refused["response"]["body"]["error"] == {
        "message": "no",
        "type": "invalid_request_error",
        "param": "stop",
        "code": "invalid_request",
    }
    assert refused["error"] == {"code": "invalid_request", "message": "no"}
    assert failed["response"]["status_code"] == 500
    assert failed["response"]["body"]["error"]["type"] == "server_error"
    assert failed["error"]["code"] == "engine_crash"


def test_what_never_ran_has_no_answer() -> None:
    expired = json.loads(told.line_of(Door.OPENAI, LINES["expired"]))
    cancelled = json.loads(told.line_of(Door.OPENAI, LINES["cancelled"]))

    assert expired["response"] is None and expired["error"] == {
        "code": "batch_expired",
        "message": "This request could not be executed before the completion window expired.",
    }
    assert cancelled["response"] is None and cancelled["error"]["code"] == "batch_cancelled"


def test_anthropics_results_say_how_each_ended() -> None:
    def result(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(told.line_of(Door.ANTHROPIC, LINES[name]))["result"]
        return found

    assert result("answered") == {"type": "succeeded", "message": {"id": "chatcmpl-1"}}
    assert result("expired") == {"type": "expired"}
    assert result("cancelled") == {"type": "canceled"}
    assert result("refused") == {
        "type": "errored",
        "error": {"type": "error", "error": {"type": "invalid_request_error", "message": "no"}},
    }
    assert result("failed")["error"]["error"]["type"] == "api_error"
