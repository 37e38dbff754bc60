"""The messages of a chat, ours of before among them, and what a chat template is given of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

from pydantic import Discriminator, Field, Tag

from app.engines.text.chat_template import Chat
from app.errors import RequestError
from app.requests.handling import Ignored, Refused, other_types
from app.requests.part import Part
from app.requests.tools import FunctionType, Tool

Ending = Literal["answer", "continued", "closed"]

_NOT_TAKEN: Final = {
    "image_url": "images are not taken: no model here sees them",
    "input_image": "images are not taken: no model here sees them",
    "video_url": "videos are not taken: no model here sees them",
    "input_audio": "audio is not taken: no model here hears it",
    "audio_url": "audio is not taken: no model here hears it",
    "file": "files are not taken: send their text",
    "input_file": "files are not taken: send their text",
}


class ContentPart(Part):
    """A part of what is said: text, or what an assistant said when it refused."""

    type: Annotated[Literal["text", "refusal"], other_types(_NOT_TAKEN)] = Field(
        description="What kind of part it is.", examples=["text"]
    )
    text: str | None = Field(None, description="With the type `text`.", examples=["Hello."])
    refusal: str | None = Field(None, description="With the type `refusal`.")
    prompt_cache_breakpoint: Annotated[Any, Ignored("prefixes are shared by themselves")] = None
    image_url: Any = Field(None, description="Not taken.")
    input_audio: Any = Field(None, description="Not taken.")
    audio_url: Any = Field(None, description="Not taken.")
    video_url: Any = Field(None, description="Not taken.")
    file: Any = Field(None, description="Not taken.")


Content = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[
        list[ContentPart], Field(min_length=1, max_length=1000, fail_fast=True), Tag("parts")
    ],
    Discriminator(lambda given: "parts" if isinstance(given, list) else "text"),
]


class CalledFunction(Part):
    name: Annotated[str, Field(min_length=1, max_length=64)] = Field(
        description="What was called.", examples=["get_weather"]
    )
    arguments: str = Field(
        description="The arguments as JSON text.", examples=['{"place": "Aarhus"}']
    )


class ToolCall(Part):
    """A call that an assistant asked for."""

    id: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        description="What the message of the role `tool` refers to.", examples=["a1b2c3d4e"]
    )
    type: FunctionType = Field("function", description="A function.")
    custom: Any = Field(None, description="Not taken.")
    function: CalledFunction = Field(description="What is to be called.")
    index: Annotated[Any, Ignored("the order says it")] = None


class ChatMessage(Part):
    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="Who speaks. A `developer` is a `system` to models that know no other.",
        examples=["user"],
    )
    content: Content | None = Field(
        None,
        description="What is said: text, or a list of parts that are text. An assistant may have "
        "said nothing.",
        examples=["Name three uses of a grist mill."],
    )
    name: Annotated[str, Field(max_length=64)] | None = Field(
        None, description="Who speaks, for templates that show it.", examples=["alice"]
    )
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = Field(
        None, description="What an assistant asked to be called."
    )
    tool_call_id: Annotated[str, Field(max_length=200)] | None = Field(
        None,
        description="The call that a message of the role `tool` answers.",
        examples=["a1b2c3d4e"],
    )
    reasoning_content: str | None = Field(
        None,
        description="What an assistant thought, for templates that show it.",
        examples=["What mills do: grind."],
    )
    reasoning: str | None = Field(
        None, description="Another name of `reasoning_content`.", examples=["What mills do: grind."]
    )
    refusal: str | None = Field(
        None, description="What an assistant said instead of `content`.", examples=[None]
    )
    annotations: Annotated[
        list[Any] | None, Ignored("they are not for the model"), Field(max_length=1000)
    ] = Field(None, examples=[[]])
    audio: Annotated[Any, Refused("no model here hears it")] = Field(None, examples=[None])
    function_call: Annotated[Any, Refused("give tool_calls")] = Field(None, examples=[None])

    @property
    def text(self) -> str | None:
        """What is said; parts are lines of their own."""
        if self.content is None or isinstance(self.content, str):
            return self.content
        return "\n".join(each.text or each.refusal or "" for each in self.content)

    def check(self, place: str) -> None:
        """Raises `RequestError` for fields that are not of this role."""
        if self.role == "assistant":
            return self._check_parts(place)
        if self.content is None:
            raise RequestError(f"The field {place}.content is required.", param=f"{place}.content")
        for name in ("tool_calls", "reasoning_content", "reasoning", "refusal"):
            if getattr(self, name):
                raise RequestError(f"{name} is an assistant's.", param=f"{place}.{name}")
        return self._check_parts(place)

    def _check_parts(self, place: str) -> None:
        if self.tool_call_id is not None and self.role != "tool":
            raise RequestError("tool_call_id is a tool's.", param=f"{place}.tool_call_id")
        for index, each in enumerate(self.content if isinstance(self.content, list) else ()):
            if getattr(each, each.type) is None or (
                each.type == "refusal" and self.role != "assistant"
            ):
                where = f"{place}.content.{index}"
                raise RequestError(f"{where} is no {each.type}.", param=where)
        for index, call in enumerate(self.tool_calls or ()):
            if object_of(call.function.arguments) is None:
                where = f"{place}.tool_calls.{index}.function.arguments"
                raise RequestError(f"{where} is no JSON object.", param=where)

    def rendered(self, names: Mapping[str, str]) -> dict[str, Any]:
        """As a chat template is given it. `names` are those of functions by the ids of calls."""
        said = self.text
        told: dict[str, Any] = {"role": self.role, "content": said or self.refusal or ""}
        name = self.name or names.get(self.tool_call_id or "")
        thought = self.reasoning_content or self.reasoning
        calls = [
            {
                "id": each.id,
                "type": "function",
                "function": {
                    "name": each.function.name,
                    "arguments": object_of(each.function.arguments),
                },
            }
            for each in self.tool_calls or ()
        ]
        optional = {
            "name": name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": thought,
            "tool_calls": calls,
        }
        return told | {key: value for key, value in optional.items() if value}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One prompt of a chat, still to be put through a model's template."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    hints: Mapping[str, Any] = field(default_factory=dict)
    ending: Ending = "answer"

    @property
    def chat(self) -> Chat:
        calls = (call for each in self.messages for call in each.tool_calls or ())
        names = {call.id: call.function.name for call in calls}
        return Chat(
            messages=[each.rendered(names) for each in self.messages],
            tools=[each.rendered for each in self.tools],
            variables=self.variables,
            hints=self.hints,
            ending=self.ending,
        )


def check_messages(messages: Iterable[ChatMessage]) -> None:
    """Raises `RequestError`, which names the first message that is wrong."""
    for index, each in enumerate(messages):
        each.check(f"messages.{index}")


def object_of(text: str) -> dict[str, Any] | None:
    """Arguments of a call; none at all are an empty object."""
    try:
        value = json.loads(text or "{}", parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(name)
