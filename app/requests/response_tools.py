"""Tools and output formats as OpenAI's Responses API writes them, and as a chat does."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from app.errors import RequestError
from app.requests.handling import Ignored, Refused
from app.requests.part import Part
from app.requests.schemas import SchemaText
from app.requests.tools import MAX_TOOLS, Function, Name


def _own(given: Any) -> Any:
    """A tool, or what names one, unless it is one that OpenAI would run."""
    kind = given.get("type") if isinstance(given, dict) else None
    if isinstance(kind, str) and kind not in ("function", "allowed_tools"):
        reason = "only functions of your own are taken: nothing is run or searched here"
        raise PydanticCustomError("not_taken", "{why}", {"why": reason})
    return given


class FunctionTool(Function):
    """A function that the model may ask to be called."""

    type: Literal["function"] = Field(description="A function.", examples=["function"])
    output_schema: Annotated[Any, Ignored("put it into the description")] = None
    allowed_callers: Annotated[Any, Ignored("the model alone calls")] = None
    defer_loading: Annotated[Any, Ignored("every tool is told")] = None
    is_async: Annotated[Any, Ignored("whoever calls decides when")] = Field(None, alias="async")

    @property
    def of_chat(self) -> dict[str, Any]:
        names = ("name", "description", "parameters", "strict")
        return {"type": "function", "function": {name: getattr(self, name) for name in names}}

    @property
    def told(self) -> dict[str, Any]:
        """As an answer gives it back."""
        return {
            "type": "function",
            "name": self.name,
            "description": self.description,
            "parameters": None if self.parameters is None else json.loads(self.parameters),
            "strict": self.strict,
        }


class NamedFunction(Part):
    type: Literal["function"] = Field("function", description="A function.")
    name: Name = Field(description="Of one of `tools`.", examples=["get_weather"])


OwnTool = Annotated[FunctionTool, BeforeValidator(_own)]
OwnName = Annotated[NamedFunction, BeforeValidator(_own)]


class ChoiceObject(Part):
    """One function that has to be called, or those that may be."""

    type: Literal["function", "allowed_tools"] = Field(
        description="Which of the two it is.", examples=["function"]
    )
    name: Name | None = Field(None, description="With the type `function`: which.")
    mode: Literal["auto", "required"] | None = Field(
        None, description="With `allowed_tools`: whether one of them has to be called."
    )
    tools: (
        Annotated[list[OwnName], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)] | None
    ) = Field(None, description="With `allowed_tools`: those of `tools` that may be called.")

    @property
    def of_chat(self) -> dict[str, Any]:
        """Raises `RequestError` for fields of the other type."""
        if self.type == "function" and self.name and not (self.mode or self.tools):
            return {"type": "function", "function": {"name": self.name}}
        if self.type == "allowed_tools" and self.mode and self.tools and not self.name:
            named = [{"type": "function", "function": {"name": each.name}} for each in self.tools]
            return {"type": "allowed_tools", "allowed_tools": {"mode": self.mode, "tools": named}}
        raise RequestError(f"The type {self.type} needs its fields alone.", param="tool_choice")


Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")]
    | Annotated[ChoiceObject, Tag("object")],
    Discriminator(lambda given: "word" if isinstance(given, str) else "object"),
    BeforeValidator(_own),
]


class TextFormat(Part):
    """Text, or JSON of some kind."""

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="Free text, any JSON object, or JSON that matches `schema`.",
        examples=["json_schema"],
    )
    name: str | None = Field(None, description="Of the schema.", examples=["mill"])
    description: str | None = Field(None, description="Accepted for compatibility and not used.")
    text: SchemaText | None = Field(
        None,
        alias="schema",
        description="With the type `json_schema`: the schema, or its text.",
        examples=[{"type": "object"}],
    )
    strict: bool | None = Field(
        None, description="Accepted for compatibility: the output always matches."
    )

    @property
    def of_chat(self) -> dict[str, Any]:
        """Raises `RequestError` for fields of another type."""
        given = {
            "name": self.name,
            "description": self.description,
            "schema": self.text,
            "strict": self.strict,
        }
        if self.type == "json_schema":
            if self.text is None or self.name is None:
                missing = "schema" if self.text is None else "name"
                raise RequestError(
                    f"The field text.format.{missing} is required.", param=f"text.format.{missing}"
                )
            return {"type": self.type, "json_schema": given}
        if self.text is not None:
            raise RequestError("A schema is for the type json_schema.", param="text.format.schema")
        return {"type": self.type}

    @property
    def told(self) -> dict[str, Any]:
        """As an answer gives it back."""
        if self.type != "json_schema":
            return {"type": self.type}
        return {
            "type": self.type,
            "name": self.name,
            "description": self.description,
            "schema": json.loads(self.text or "{}"),
            "strict": self.strict,
        }


class TextConfig(Part):
    """The form of the output."""

    format: TextFormat | None = Field(None, description="Text, or JSON that it is held to.")
    verbosity: Annotated[Any, Refused("say it in the instructions", ("medium",))] = Field(
        None, examples=["low"]
    )


NAMES: Final = {
    "tool_choice.function.name": "tool_choice.name",
    "tool_choice.allowed_tools": "tool_choice.tools",
    "response_format": "text.format",
    "response_format.json_schema": "text.format.schema",
    "response_format.json_schema.schema": "text.format.schema",
    "response_format.json_schema.name": "text.format.name",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "chat_template_kwargs": "reasoning",
}
"""What fields of a chat are called here."""
