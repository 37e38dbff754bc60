"""JSON schemas in a request: checked as far as that needs no model, and kept as text."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final
from urllib.parse import unquote

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

MAX_CHARACTERS: Final = 64_000
"""Of a schema or regular expression."""

MAX_DEPTH: Final = 64
"""Of the objects and lists in a schema."""

MAX_PATTERNS: Final = 10
"""That one text has to match at once. The grammar library looks whether any text can, and takes
three times as long and as much memory for each more: a gigabyte for 14."""

INVALID_SCHEMA: Final = "invalid_schema"
"""The type of a problem that is to be told as one of the schema."""


def invalid(reason: str) -> PydanticCustomError:
    return PydanticCustomError(INVALID_SCHEMA, "{reason}", {"reason": reason})


def _as_text(value: object) -> str:
    """A schema as JSON text: Postgres' jsonb would forget the order of its keys, which is that of
    the answer's."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise invalid("The schema is not JSON.") from None
    if not isinstance(value, dict):
        raise ValueError("Input should be a JSON object, or the text of one")
    if _is_deep(value):
        raise invalid(f"The schema is nested more than {MAX_DEPTH} deep.")
    if _most_patterns(value) > MAX_PATTERNS:
        raise invalid(f"More than {MAX_PATTERNS} patterns meet in one text.")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError):  # a number without end, or what a message's decoder made
        raise invalid("The schema is not JSON.") from None
    if len(text) > MAX_CHARACTERS:
        raise invalid(f"It has more than {MAX_CHARACTERS} characters.")
    return text


SchemaText = Annotated[
    str, BeforeValidator(_as_text), WithJsonSchema({"type": ["object", "string"]})
]
"""The text of a schema; given as an object, or as its text."""


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return bool(level)


def _most_patterns(schema: dict[str, Any]) -> int:
    """How many patterns one text of a schema has to match at most; rather too many than too few."""
    found: dict[str, int] = {}  # by reference

    def most(node: object) -> int:
        if isinstance(node, list):
            return max(map(most, node), default=0)
        if not isinstance(node, dict):
            return 0
        every = node.get("allOf")
        rest = [inner for name, inner in node.items() if name != "allOf"]
        return (
            isinstance(node.get("pattern"), str)
            + (sum(map(most, every)) if isinstance(every, list) else most(every))
            + referred(node.get("$ref"))
            + most(rest)
        )

    def referred(ref: object) -> int:
        if not isinstance(ref, str):
            return 0
        if ref not in found:
            found[ref] = 0  # in a circle it adds nothing
            found[ref] = most(_at(schema, ref))
        return found[ref]

    try:
        return most(schema)
    except RecursionError:
        raise invalid("Its references lead too far.") from None


def _at(schema: dict[str, Any], ref: str) -> object:
    """What a reference leads to (a JSON pointer, RFC 6901), or all, if that cannot be told."""
    node: Any = schema
    for step in unquote(ref).removeprefix("#").split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        try:
            node = node[int(name)] if isinstance(node, list) else node[name]
        except (KeyError, TypeError, ValueError, IndexError):
            return schema
    return node
