"""Functions that a model may ask to be called. They are told to it, and never called here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import Discriminator, Field, Tag

from app.errors import RequestError
from app.requests.handling import other_types
from app.requests.part import Part
from app.requests.schemas import SchemaText

MAX_TOOLS: Final = 128

_NO_CUSTOM: Final = other_types({"custom": "custom tools are not taken: give functions"})
FunctionType = Annotated[Literal["function"], _NO_CUSTOM]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(Part):
    name: Name = Field(description="What it is called by.", examples=["get_weather"])
    description: str | None = Field(
        None, description="What it does, for the model.", examples=["The weather of a place."]
    )
    parameters: SchemaText | None = Field(
        None,
        description="JSON schema of its arguments, an object, or its text; none when left out.",
        examples=[{"type": "object", "properties": {"place": {"type": "string"}}}],
    )
    strict: bool | None = Field(
        None,
        description="Accepted for compatibility: calls that are `required` or named always match.",
        examples=[True],
    )

    @property
    def schema_text(self) -> str:
        """Of its arguments, which are an object."""
        return self.parameters or _NO_PARAMETERS


_ANY_OBJECT: Final = '{"type":"object","properties":{}}'
_NO_PARAMETERS: Final = '{"type":"object","properties":{},"additionalProperties":false}'


class Tool(Part):
    type: FunctionType = Field(description="A function.", examples=["function"])
    custom: Any = Field(None, description="Not taken.")
    function: Function = Field(description="The function.")

    @property
    def rendered(self) -> dict[str, Any]:
        """As a chat template is given it."""
        told = {
            "name": self.function.name,
            "description": self.function.description or "",
            "parameters": json.loads(
                self.function.parameters or '{"type":"object","properties":{}}'
            ),
        }
        return {"type": "function", "function": told}


class FunctionName(Part):
    name: Name = Field(description="Of one of `tools`.", examples=["get_weather"])


class NamedTool(Part):
    type: Literal["function"] = Field(description="A function.", examples=["function"])
    function: FunctionName = Field(description="The function.")


class AllowedTools(Part):
    mode: Literal["auto", "required"] = Field(
        description="Whether one of them has to be called.", examples=["auto"]
    )
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)] = (
        Field(description="Those of `tools` that may be called.")
    )


class ToolObject(Part):
    """One function that has to be called, or those that may be."""

    type: Annotated[Literal["function", "allowed_tools"], _NO_CUSTOM] = Field(
        description="Which of the two fields is given.", examples=["function"]
    )
    custom: Any = Field(None, description="Not taken.")
    function: FunctionName | None = Field(None, description="The function.")
    allowed_tools: AllowedTools | None = Field(None, description="The functions.")


Word = Literal["none", "auto", "required"]
ToolChoice = Annotated[
    Annotated[Word, Tag("word")] | Annotated[ToolObject, Tag("object")],
    Discriminator(lambda given: "word" if isinstance(given, str) else "object"),
]


@dataclass(frozen=True, slots=True)
class Offer:
    """What a model may call."""

    functions: tuple[Function, ...] = ()
    is_required: bool = False  #: it has to call one
    is_named: bool = False  #: it has to call this one
    is_many: bool = True  #: it may call several at once


NO_OFFER: Final = Offer()


def offer_of(tools: list[Tool], choice: ToolChoice | None, many: bool) -> Offer:
    """Raises `RequestError` for a choice of what there is not."""
    by_name = {each.function.name: each.function for each in tools}
    if len(by_name) < len(tools):
        raise RequestError("Two tools have the same name.", param="tools")
    mode, names, param = _chosen(choice)
    if mode == "none":
        return NO_OFFER
    for name in names or ():
        if name not in by_name:
            raise RequestError(f"There is no tool {name}.", param=param)
    functions = tuple(by_name[name] for name in names) if names else tuple(by_name.values())
    if mode == "required" and not functions:
        raise RequestError("There are no tools to call.", param="tool_choice")
    is_named = isinstance(choice, ToolObject) and choice.type == "function"
    return Offer(functions, mode == "required", is_named, many and not is_named)


def _chosen(choice: ToolChoice | None) -> tuple[Word, list[str] | None, str]:
    """Whether something is to be called, which ones if not all, and the field that says so."""
    if choice is None or isinstance(choice, str):
        return choice or "auto", None, "tool_choice"
    if choice.type == "function" and choice.function and not choice.allowed_tools:
        return "required", [choice.function.name], "tool_choice.function.name"
    if choice.type == "allowed_tools" and choice.allowed_tools and not choice.function:
        names = [each.function.name for each in choice.allowed_tools.tools]
        return choice.allowed_tools.mode, list(dict.fromkeys(names)), "tool_choice.allowed_tools"
    raise RequestError(f"The type {choice.type} needs its field alone.", param="tool_choice")
