"""What form an output is to have: the fields `response_format` and `structured_outputs`."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field

from app.errors import RequestError
from app.jobs import Grammar
from app.requests.part import Part
from app.requests.schemas import MAX_CHARACTERS, SchemaText, invalid

SCHEMA_FIELD: Final = "response_format.json_schema.schema"
_ANY_OBJECT: Final = '{"type":"object"}'
MAX_CHOICES: Final = 200


class JsonSchema(Part):
    """The schema that an output matches."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] = Field(
        description="Accepted for compatibility and not used.", examples=["mill"]
    )
    description: str | None = Field(
        None, description="Accepted for compatibility and not used.", examples=["A mill."]
    )
    text: SchemaText = Field(
        _ANY_OBJECT,
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


def _bounded(pattern: str) -> str:
    if len(pattern) > MAX_CHARACTERS:
        raise invalid(f"It has more than {MAX_CHARACTERS} characters.")
    return pattern


class StructuredOutputs(Part):
    """vLLM's name for other forms: one of them."""

    regex: Annotated[str, Field(min_length=1), AfterValidator(_bounded)] | None = Field(
        None,
        description="A regular expression, in Rust's syntax, that the whole output matches.",
        examples=["(yes|no)"],
    )
    choice: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=1_000)]],
            Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True),
        ]
        | None
    ) = Field(
        None, description="Texts, one of which is the whole output.", examples=[["yes", "no"]]
    )
    json_text: SchemaText | None = Field(
        None,
        alias="json",
        description="A JSON schema, or its text, as in `response_format`.",
        examples=[{"type": "object"}],
    )
    json_object: Literal[True] | None = Field(None, description="Any JSON object.", examples=[True])

    @property
    def form(self) -> str:
        """The name of the field that is given. Raises `RequestError` unless it is one."""
        forms = {
            "regex": self.regex,
            "choice": self.choice,
            "json": self.json_text,
            "json_object": self.json_object,
        }
        given = [name for name, value in forms.items() if value is not None]
        if len(given) != 1:
            raise RequestError(f"Give one of {', '.join(forms)}.", param="structured_outputs")
        return given[0]

    @property
    def grammar(self) -> Grammar:
        match self.form:
            case "regex":
                return Grammar("regex", self.regex or "")
            case "choice":
                return Grammar("regex", "|".join(map(_escaped, self.choice or ())))
        return Grammar("json_schema", self.json_text or _ANY_OBJECT)


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
        return other.grammar
    if kind == "text":
        return None
    return Grammar("json_schema", _ANY_OBJECT if schema is None else schema.text)


def field_of(other: StructuredOutputs | None) -> str:
    """The field of a request that its grammar is in."""
    return SCHEMA_FIELD if other is None else f"structured_outputs.{other.form}"


def _escaped(text: str) -> str:
    """A text as a regular expression in Rust's syntax that matches it alone."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&~-]", r"\\\g<0>", text)
