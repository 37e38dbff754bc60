"""Blocks of what is said in a conversation of Anthropic's API, and the messages of a chat that they
become."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from app.errors import RequestError
from app.requests.handling import Ignored
from app.requests.part import Part

if TYPE_CHECKING:
    from app.requests.messages import Message, System

CALL_PREFIX: Final = "toolu_"
"""Of the ids of calls; templates see them without, since some take nine characters alone."""

MAX_BLOCKS: Final = 1_000

_Cache = Annotated[Any, Ignored("prefixes are shared by themselves")]
_NO_IMAGE: Final = "images are not taken: no model here sees them"
_NOT_TAKEN: Final = {
    "image": _NO_IMAGE,
    "search_result": "search results are not taken: send their text",
    "server_tool_use": "nothing is run here: send what came out as text",
    "web_search_tool_result": "nothing is searched here: send what came out as text",
    "web_fetch_tool_result": "nothing is fetched here: send what came out as text",
    "code_execution_tool_result": "nothing is run here: send what came out as text",
    "bash_code_execution_tool_result": "nothing is run here: send what came out as text",
    "text_editor_code_execution_tool_result": "nothing is run here: send what came out as text",
    "tool_search_tool_result": "every tool is told",
    "tool_reference": "every tool is told",
    "container_upload": "files are not taken: send their text",
    "browser_state": "no model here sees it",
}
_NO_SOURCE: Final = dict.fromkeys(
    ("base64", "url", "file", "content"), "documents are taken as plain text alone"
)


class Typed(Part):
    """An object whose type says what else is in it: one that is not taken is told before that."""

    NOT_TAKEN: ClassVar[Mapping[str, str]] = _NOT_TAKEN  #: why, by type

    @model_validator(mode="before")
    @classmethod
    def _take(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        if isinstance(kind, str) and kind in cls.NOT_TAKEN:
            raise PydanticCustomError("not_taken", "{why}", {"why": cls.NOT_TAKEN[kind]})
        return given


class TextSource(Typed):
    NOT_TAKEN = _NO_SOURCE

    type: Literal["text"] = Field(description="Plain text.")
    media_type: Literal["text/plain"] = Field("text/plain", description="Plain text.")
    data: str = Field(description="The text.", examples=["A mill grinds."])


class SaidBlock(Typed):
    """A block that is text."""

    type: Literal["text"] = Field(description="What kind of block it is.", examples=["text"])
    text: str = Field(description="The text.", examples=["Hello."])
    cache_control: _Cache = None
    citations: Annotated[Any, Ignored("they are not for the model")] = None


class _Passage(Typed):
    """What a block of text or of a document holds."""

    text: str | None = Field(None, description="With the type `text`.", examples=["12 degrees"])
    source: TextSource | None = Field(None, description="With the type `document`.")
    title: str | None = Field(None, description="Of a document.")
    context: str | None = Field(None, description="Of a document.")
    cache_control: _Cache = None
    citations: Annotated[Any, Ignored("they are not for the model")] = None

    @property
    def said(self) -> str:
        if self.source is None:
            return self.text or ""
        return "\n".join(each for each in (self.title, self.context, self.source.data) if each)


class ResultBlock(_Passage):
    """A block of what a tool gave back."""

    type: Literal["text", "document"] = Field(
        description="What kind of block it is.", examples=["text"]
    )


Results = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[ResultBlock], Field(max_length=MAX_BLOCKS, fail_fast=True), Tag("blocks")],
    Discriminator(lambda given: "blocks" if isinstance(given, list) else "text"),
]


class Block(_Passage):
    """A block of a turn: text, a document, a thought, a call, or what a call gave back."""

    type: Literal[
        "text", "document", "thinking", "redacted_thinking", "tool_use", "tool_result"
    ] = Field(description="What kind of block it is.", examples=["text"])
    thinking: str | None = Field(None, description="With the type `thinking`.")
    signature: Annotated[str | None, Ignored("thoughts are not signed here")] = None
    data: Annotated[str | None, Ignored("no model here can read it")] = None
    id: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, description="Of a call.", examples=["toolu_a1b2c3d4e"]
    )
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        None, description="What was called.", examples=["get_weather"]
    )
    input: dict[str, Any] | None = Field(
        None, description="What it was called with.", examples=[{"place": "Aarhus"}]
    )
    caller: Annotated[Any, Ignored("the model alone calls")] = None
    toolset_name: Annotated[Any, Ignored("there are no toolsets")] = None
    tool_use_id: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, description="The call that this is the result of.", examples=["toolu_a1b2c3d4e"]
    )
    content: Results | None = Field(None, description="What the call gave back.")
    is_error: bool = Field(False, description="Whether the call failed.", examples=[True])


Blocks = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[
        list[Block], Field(min_length=1, max_length=MAX_BLOCKS, fail_fast=True), Tag("blocks")
    ],
    Discriminator(lambda given: "blocks" if isinstance(given, list) else "text"),
]

_NEEDED: Final = {
    "text": ("text",),
    "document": ("source",),
    "thinking": ("thinking",),
    "redacted_thinking": (),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
}
_SPEAKERS: Final = {
    "thinking": "assistant",
    "redacted_thinking": "assistant",
    "tool_use": "assistant",
    "tool_result": "user",
    "document": "user",
}


def chat_messages(messages: Iterable[Message], system: System | None) -> list[dict[str, Any]]:
    """The messages of a chat. Raises `RequestError` naming the block that is wrong."""
    told: list[dict[str, Any]] = []
    if system:
        text = system if isinstance(system, str) else "\n".join(each.text for each in system)
        told.append({"role": "system", "content": text})
    for index, message in enumerate(messages):
        for part in _parts(message, f"messages.{index}"):
            _add(told, part)
    return told


def _add(told: list[dict[str, Any]], part: dict[str, Any]) -> None:
    """Turns of one speaker one after the other are one; each result of a tool stands alone."""
    last = told[-1] if told else None
    if last is None or last["role"] != part["role"] or part["role"] == "tool":
        told.append(part)
        return
    for field, between in (("content", "\n"), ("reasoning_content", "\n")):
        both = [each[field] for each in (last, part) if each.get(field)]
        if both:
            last[field] = between.join(both)
    if calls := [*last.get("tool_calls", ()), *part.get("tool_calls", ())]:
        last["tool_calls"] = calls


def _parts(message: Message, place: str) -> Iterator[dict[str, Any]]:
    role = message.role
    if isinstance(message.content, str):
        yield {"role": role, "content": message.content}
        return
    said: dict[str, Any] = {"role": role}
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(message.content):
        _check(block, role, f"{place}.content.{index}")
        match block.type:
            case "thinking":
                thoughts.append(block.thinking or "")
            case "tool_use":
                calls.append(_call(block))
            case "tool_result":
                yield _result(block, f"{place}.content.{index}")
            case "text" | "document":
                texts.append(block.said)
    if texts or role == "assistant":
        said["content"] = "\n".join(texts)
    if thoughts:
        said["reasoning_content"] = "\n".join(thoughts)
    if calls:
        said["tool_calls"] = calls
    if len(said) > 1:
        yield said


def _check_fields(block: Block | ResultBlock, place: str) -> None:
    for field in _NEEDED[block.type]:
        if getattr(block, field) is None:
            raise RequestError(f"The field {place}.{field} is required.", param=f"{place}.{field}")


def _check(block: Block, role: str, place: str) -> None:
    _check_fields(block, place)
    if role != _SPEAKERS.get(block.type, role):
        raise RequestError(
            f"{place}: a block {block.type} is for the role {_SPEAKERS[block.type]}.",
            param=f"{place}.type",
        )


def _call(block: Block) -> dict[str, Any]:
    return {
        "id": (block.id or "").removeprefix(CALL_PREFIX) or block.id,
        "type": "function",
        "function": {
            "name": block.name,
            "arguments": json.dumps(block.input, ensure_ascii=False),
        },
    }


def _result(block: Block, place: str) -> dict[str, Any]:
    given = block.content
    if isinstance(given, list):
        for index, each in enumerate(given):
            _check_fields(each, f"{place}.content.{index}")
        given = "\n".join(each.said for each in given)
    text = given or ""
    call_id = block.tool_use_id or ""
    return {
        "role": "tool",
        "tool_call_id": call_id.removeprefix(CALL_PREFIX) or call_id,
        "content": f"Error: {text}" if block.is_error else text,
    }
