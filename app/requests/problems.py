"""What is wrong with a value that somebody sent, as one sentence that names the field.

No sentence quotes the value: it may be a prompt.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from app.errors import InvalidSchema, RequestError
from app.requests.part import MAX_TOLD, UNKNOWN_FIELD, printable
from app.requests.schemas import INVALID_SCHEMA


def first_problem(error: ValidationError, raw: dict[str, Any]) -> RequestError:
    """The first problem as a sentence; unions report once per branch, so the top field decides."""
    problem = error.errors(include_url=False, include_input=False)[0]
    path = _path_in(raw, problem["loc"], is_missing=problem["type"] == "missing")
    if problem["type"] == UNKNOWN_FIELD:
        param = ".".join([*map(printable, path), problem["ctx"]["name"]])[:MAX_TOLD]
        return RequestError(f"Unknown field {param}.", param=param)
    param = printable(".".join(path) or "body")
    if problem["type"] == "missing":
        return RequestError(f"The field {param} is required.", param=param)
    if problem["type"] == INVALID_SCHEMA:
        return InvalidSchema(problem["msg"], param=param)
    reason = problem["msg"].removeprefix("Value error, ")
    return RequestError(f"{param}: {reason}.", param=param)


def _path_in(value: Any, place: tuple[int | str, ...], *, is_missing: bool) -> list[str]:
    """What of an error's place is in the value: fields and indices, not names of union branches.

    Of one that `is_missing` the last is not there, and named all the same.
    """
    path = []
    for part in place[:-1] if is_missing else place:
        match value:
            case dict() if part in value:
                value = value[part]
            case list() if isinstance(part, int):
                value = value[part]
            case _:
                continue
        path.append(str(part))
    return [*path, str(place[-1])] if is_missing else path
