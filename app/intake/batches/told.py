"""A line of a batch's output, and of its error file. Pure.

A line without an answer tells why twice: as `error`, and where there was a request as the body of
an HTTP answer. Clients look at the one or at the other.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any, Final

from app.batches import Door, LineOutcome
from app.store.batch_lines import EndedLine

_NEVER_RUN: Final = {
    LineOutcome.EXPIRED: (
        "batch_expired",
        "This request could not be executed before the completion window expired.",
    ),
    LineOutcome.CANCELLED: (
        "batch_cancelled",
        "This request was not executed: it was cancelled.",
    ),
}
_REMOVED: Final = ("response_removed", "The response of this request was removed.")
_WRONG: Final = frozenset(
    {"invalid_request", "invalid_schema", "context_length_exceeded", "model_not_found"}
)
"""Codes of jobs that failed by their request; others failed by us."""


def line_of(door: Door, line: EndedLine) -> bytes:
    """The line, with its end."""
    text = _anthropic(line) if door is Door.ANTHROPIC else _openai(line)
    return text.encode() + b"\n"


def _openai(line: EndedLine) -> str:
    digits = line.job_id.hex if line.job_id else f"{line.number:032x}"
    name = f'"id":"batch_req_{digits}","custom_id":{_json(line.custom_id)}'
    if line.outcome is LineOutcome.SUCCEEDED and line.response is not None:
        answer = f'{{"status_code":200,"request_id":"req_{digits}","body":{line.response}}}'
        return f'{{{name},"response":{answer},"error":null}}'
    status, error = _problem(line)
    response = None
    if status is not None:
        response = {
            "status_code": status,
            "request_id": f"req_{digits}",
            "body": {
                "error": {
                    "message": error["message"],
                    "type": "server_error" if status >= 500 else "invalid_request_error",
                    "param": error.get("param"),
                    "code": error["code"],
                }
            },
        }
    told = {"code": error["code"], "message": error["message"]}
    return f'{{{name},"response":{_json(response)},"error":{_json(told)}}}'


def _anthropic(line: EndedLine) -> str:
    """https://docs.claude.com/en/api/retrieving-message-batch-results"""
    name = f'"custom_id":{_json(line.custom_id)}'
    match line.outcome:
        case LineOutcome.SUCCEEDED if line.response is not None:
            result = f'{{"type":"succeeded","message":{line.response}}}'
        case LineOutcome.EXPIRED:
            result = '{"type":"expired"}'
        case LineOutcome.CANCELLED:
            result = '{"type":"canceled"}'
        case _:
            status, error = _problem(line)
            kind = "api_error" if status is None or status >= 500 else "invalid_request_error"
            kind = "not_found_error" if status == HTTPStatus.NOT_FOUND else kind
            told = {"type": kind, "message": error["message"]}
            result = _json({"type": "errored", "error": {"type": "error", "error": told}})
    return f'{{{name},"result":{result}}}'


def _problem(line: EndedLine) -> tuple[int | None, dict[str, Any]]:
    """The HTTP status of the answer, None if there was none, and the error."""
    if line.error is not None:
        return line.error.get("status"), line.error
    if line.outcome in _NEVER_RUN:
        code, message = _NEVER_RUN[line.outcome]
        return None, {"code": code, "message": message}
    if line.error_code is None:
        code, message = _REMOVED
        return HTTPStatus.GONE, {"code": code, "message": message}
    status = (
        HTTPStatus.BAD_REQUEST if line.error_code in _WRONG else HTTPStatus.INTERNAL_SERVER_ERROR
    )
    return status, {"code": line.error_code, "message": line.error_message or ""}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
