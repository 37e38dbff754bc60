"""Items of a conversation in OpenAI's Responses API, and the messages of a chat that they become:
https://platform.openai.com/docs/api-reference/responses/input-items.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from app.errors import RequestError
from app.requests.conversation import object_of
from app.requests.handling import Ignored, other_types
from app.requests.part import Part

MAX_ITEMS: Final = 1_000
"""Of a conversation."""

_Told = Annotated[Any, Ignored("it is told, not asked")]
_Aside = Annotated[Any, Ignored("it is not for the model")]
_NOT_TAKEN: Final = {
    "input_image": "images are not taken: no model here sees them",
    "input_file": "files are not taken: send their text",
    "input_audio": "audio is not taken: no model here hears it",
}


class TextPart(Part):
    """A part of what is said: text, or what an assistant said when it refused."""

    type: Annotated[
        Literal["input_text", "output_text", "text", "refusal"], other_types(_NOT_TAKEN)
    ] = Field(description="What kind of part it is.", examples=["input_text"])
    text: str | None = Field(None, description="Unless it is a refusal.", examples=["Hello."])
    refusal: str | None = Field(None, description="With the type `refusal`.")
    annotations: _Aside = None
    logprobs: _Aside = None
    prompt_cache_breakpoint: Annotated[Any, Ignored("prefixes are shared by themselves")] = None
    image_url: Any = Field(None, description="Not taken.")
    file_id: Any = Field(None, description="Not taken.")
    file_data: Any = Field(None, description="Not taken.")
    file_url: Any = Field(None, description="Not taken.")
    filename: Any = Field(None, description="Not taken.")
    detail: Any = Field(None, description="Not taken.")

    @property
    def said(self) -> str | None:
        return self.refusal if self.type == "refusal" else self.text


Parts = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[TextPart], Field(max_length=MAX_ITEMS, fail_fast=True), Tag("parts")],
    Discriminator(lambda given: "parts" if isinstance(given, list) else "text"),
]


class _Item(Part):
    id: _Told = None
    status: _Told = None
    created_by: _Told = None


class MessageItem(_Item):
    """A turn of the conversation."""

    type: Literal["message"] = Field("message", description="A message.")
    role: Literal["user", "assistant", "system", "developer"] = Field(
        description="Who speaks.", examples=["user"]
    )
    content: Parts = Field(
        description="What is said: text, or a list of parts that are text.",
        examples=["Name three uses of a grist mill."],
    )
    phase: _Aside = None

    @property
    def text(self) -> str:
        """Parts are lines of their own, as they are of a chat."""
        return _text(self.content)

    def check(self, place: str) -> None:
        _check(self.content, f"{place}.content", is_assistant=self.role == "assistant")


class CallItem(_Item):
    """A call that the model asked for."""

    type: Literal["function_call"] = Field(description="A call.")
    call_id: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        description="What its output refers to.", examples=["a1b2c3d4e"]
    )
    name: Annotated[str, Field(min_length=1, max_length=64)] = Field(
        description="What was called.", examples=["get_weather"]
    )
    arguments: str = Field(
        description="The arguments as JSON text.", examples=['{"place": "Aarhus"}']
    )
    namespace: _Aside = None
    caller: _Aside = None
    is_async: _Aside = Field(None, alias="async")

    def check(self, place: str) -> None:
        if object_of(self.arguments) is None:
            raise RequestError(f"{place}.arguments is no JSON object.", param=f"{place}.arguments")


class OutputItem(_Item):
    """What a call gave back."""

    type: Literal["function_call_output"] = Field(description="The output of a call.")
    call_id: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        description="The call that it is of.", examples=["a1b2c3d4e"]
    )
    output: Parts = Field(
        description="A text, or a list of parts that are text.", examples=["12 degrees"]
    )
    name: _Aside = None
    namespace: _Aside = None
    caller: _Aside = None

    @property
    def text(self) -> str:
        return _text(self.output)

    def check(self, place: str) -> None:
        _check(self.output, f"{place}.output", is_assistant=False)


class ThoughtPart(Part):
    type: Literal["reasoning_text", "summary_text"] = Field(description="What kind of part it is.")
    text: str = Field(description="The text.", examples=["What mills do: grind."])


_Thoughts = Annotated[list[ThoughtPart], Field(max_length=MAX_ITEMS, fail_fast=True)]


class ReasoningItem(_Item):
    """What the model thought, for templates that show it."""

    type: Literal["reasoning"] = Field(description="A thought.")
    summary: _Thoughts = Field(default_factory=list, description="In place of `content`.")
    content: _Thoughts = Field(default_factory=list, description="The thought, as it was told.")
    encrypted_content: _Aside = None

    @property
    def text(self) -> str:
        return "\n".join(each.text for each in self.content or self.summary)

    def check(self, place: str) -> None:
        """Whatever it says is right."""


_CLASSES: Final = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": OutputItem,
    "reasoning": ReasoningItem,
}


_NO_REFERENCE: Final = "references are not followed: send the item, or previous_response_id"
_UNKNOWN: Final = f"items of this type are not taken; known are {', '.join(_CLASSES)}"


def _type_of(given: Any) -> str:
    """Messages may leave it out."""
    found = given.get("type") if isinstance(given, dict) else given.type
    return "message" if found is None else str(found)


def _known(given: Any) -> Any:
    if not isinstance(given, dict | _Item):
        raise ValueError("Input should be an object")
    is_reference = isinstance(given, dict) and "id" in given and given.keys() <= {"id", "type"}
    kind = _type_of(given)
    if kind == "item_reference" or (kind == "message" and is_reference):
        raise PydanticCustomError("not_taken", "{why}", {"why": _NO_REFERENCE})
    if kind not in _CLASSES:
        raise PydanticCustomError("not_taken", "{why}", {"why": _UNKNOWN})
    return given


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[OutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_type_of),
    BeforeValidator(_known),
]


def check_items(items: Iterable[Item], field: str) -> None:
    """Raises `RequestError`, which names the first item that is wrong."""
    for index, each in enumerate(items):
        each.check(f"{field}.{index}")


def chat_messages(instructions: str | None, items: Iterable[Item]) -> list[dict[str, Any]]:
    """The messages of a chat. What an assistant thinks, says and calls in a row is one of them."""
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        match item:
            case ReasoningItem():
                turn = _assistant(messages, without=("reasoning_content", "content", "tool_calls"))
                turn["reasoning_content"] = item.text
            case MessageItem(role="assistant"):
                turn = _assistant(messages, without=("content", "tool_calls"))
                turn["content"] = item.text
            case MessageItem():
                messages.append({"role": item.role, "content": item.text})
            case CallItem():
                turn = _assistant(messages)
                called = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": called}
                turn.setdefault("tool_calls", []).append(call)
            case OutputItem():
                messages.append(
                    {"role": "tool", "tool_call_id": item.call_id, "content": item.text}
                )
    return messages


def _assistant(messages: list[dict[str, Any]], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The assistant's turn that goes on, if it has none of these yet; else a new one."""
    if not messages or messages[-1]["role"] != "assistant" or messages[-1].keys() & set(without):
        messages.append({"role": "assistant"})
    return messages[-1]


def _text(parts: str | list[TextPart]) -> str:
    return parts if isinstance(parts, str) else "\n".join(each.said or "" for each in parts)


def _check(parts: str | list[TextPart], place: str, *, is_assistant: bool) -> None:
    for index, each in enumerate(parts if isinstance(parts, list) else ()):
        if each.said is None or (each.type == "refusal" and not is_assistant):
            where = f"{place}.{index}"
            raise RequestError(f"{where} is no {each.type}.", param=where)
