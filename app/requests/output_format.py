"""What form an output is to have: the fields `response_format` and `structured_outputs`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal
from urllib.parse import unquote

from pydantic import BeforeValidator, Field, WithJsonSchema

from app.errors import InvalidSchema, RequestError
from app.jobs import Grammar
from app.requests.part import Part

MAX_CHARACTERS: Final = 64_000
"""Of a schema or regular expression."""

MAX_DEPTH: Final = 64
"""Of the objects and lists in a schema."""

MAX_PATTERNS: Final = 10
"""That one text has to match at once. The grammar library looks whether any text can, and takes
three times as long and as much memory for each more: a gigabyte for 14."""

SCHEMA_FIELD: Final = "response_format.json_schema.schema"
REGEX_FIELD: Final = "structured_outputs.regex"
_ANY_OBJECT: Final = '{"type":"object"}'


def _as_text(value: object) -> str:
    """A schema as JSON text: Postgres' jsonb would forget the order of its keys, which is that of
    the answer's."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InvalidSchema("The schema is not JSON.", param=SCHEMA_FIELD) from None
    if not isinstance(value, dict):
        raise ValueError("Input should be a JSON object, or the text of one")
    if _is_deep(value):
        raise InvalidSchema(f"The schema is nested more than {MAX_DEPTH} deep.", param=SCHEMA_FIELD)
    if _most_patterns(value) > MAX_PATTERNS:
        raise InvalidSchema(
            f"More than {MAX_PATTERNS} patterns meet in one text.", param=SCHEMA_FIELD
        )
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError):  # a number without end, or what a message's decoder made
        raise InvalidSchema("The schema is not JSON.", param=SCHEMA_FIELD) from None
    return _bounded(text, SCHEMA_FIELD)


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
        raise InvalidSchema("Its references lead too far.", param=SCHEMA_FIELD) from None


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


def _bounded(text: str, field: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise InvalidSchema(f"It has more than {MAX_CHARACTERS} characters.", param=field)
    return text


class JsonSchema(Part):
    """The schema that an output matches."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] = Field(
        description="Accepted for compatibility and not used.", examples=["mill"]
    )
    description: str | None = Field(
        None, description="Accepted for compatibility and not used.", examples=["A mill."]
    )
    text: Annotated[
        str, BeforeValidator(_as_text), WithJsonSchema({"type": ["object", "string"]})
    ] = Field(
        alias="schema",
        description="The JSON schema, or its text. Keys are written in its order.",
        examples=[{"type": "object", "properties": {"name": {"type": "string"}}}],
    )
    strict: bool | None = Field(
        None,
        description="Accepted for compatibility: the output always matches.",
        examples=[True],
    )


class ResponseFormat(Part):
    """Text, or JSON of some kind."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="Free text, any JSON object, or JSON that matches `json_schema`.",
        examples=["json_schema"],
    )
    json_schema: JsonSchema | None = Field(
        None, description="The schema, with the type `json_schema`."
    )


class StructuredOutputs(Part):
    """vLLM's name for other forms."""

    regex: Annotated[str, Field(min_length=1)] = Field(
        description="A regular expression, in Rust's syntax, that the whole output matches.",
        examples=["(yes|no)"],
    )


def grammar_of(form: ResponseFormat | None, other: StructuredOutputs | None) -> Grammar | None:
    """What the output has to match, if anything. Raises `RequestError` if the fields disagree."""
    kind = "text" if form is None else form.type
    schema = None if form is None else form.json_schema
    if kind == "json_schema" and schema is None:
        raise RequestError(
            "The type json_schema needs json_schema.", param="response_format.json_schema"
        )
    if kind != "json_schema" and schema is not None:
        raise RequestError(
            "json_schema is for the type json_schema.", param="response_format.json_schema"
        )
    if other is not None:
        if kind != "text":
            raise RequestError(
                "Give response_format or structured_outputs, not both.", param="structured_outputs"
            )
        return Grammar("regex", _bounded(other.regex, REGEX_FIELD))
    if kind == "text":
        return None
    return Grammar("json_schema", _ANY_OBJECT if schema is None else schema.text)


def field_of(grammar: Grammar) -> str:
    """The field of a request that a grammar is in."""
    return REGEX_FIELD if grammar.kind == "regex" else SCHEMA_FIELD


def checked(
    raw: dict[str, Any], form: ResponseFormat | None, other: StructuredOutputs | None
) -> dict[str, Any]:
    """The body as it is kept: a schema in it is text. Raises as `grammar_of` does."""
    grammar_of(form, other)
    if form is None or form.json_schema is None:
        return raw
    given = raw["response_format"]
    schema = given["json_schema"] | {"schema": form.json_schema.text}
    return raw | {"response_format": given | {"json_schema": schema}}
