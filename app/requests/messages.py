"""The call /v1/messages, as Anthropic's API has it: https://platform.claude.com/docs/en/api/messages.

What it asks is asked of a model as a chat: blocks become messages of a chat template, in their
order, and turns of one speaker become one.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from app.errors import RequestError
from app.jobs import Kind
from app.requests.body import Body
from app.requests.chat import ChatBody
from app.requests.handling import Ignored, Refused, Whole
from app.requests.message_blocks import Blocks, SaidBlock, chat_messages
from app.requests.part import Part
from app.requests.problems import first_problem
from app.requests.sampled import Count
from app.requests.schemas import SchemaText
from app.requests.tools import MAX_TOOLS, Name

MAX_MESSAGES: Final = 1_000
MAX_STOPS: Final = 64


class Message(Part):
    """A turn of the conversation."""

    role: Literal["user", "assistant", "system"] = Field(
        description="Who speaks.", examples=["user"]
    )
    content: Blocks = Field(
        description="What is said: text, or a list of blocks.",
        examples=["Name three uses of a grist mill."],
    )


class MessageTool(Part):
    """A function that the model may ask to be called."""

    type: Literal["custom"] = Field("custom", description="A tool of your own.")
    name: Name = Field(description="What it is called by.", examples=["get_weather"])
    description: str | None = Field(
        None, description="What it does, for the model.", examples=["The weather of a place."]
    )
    input_schema: SchemaText = Field(
        description="JSON schema of its input, an object.",
        examples=[{"type": "object", "properties": {"place": {"type": "string"}}}],
    )
    strict: Annotated[bool | None, Ignored("calls that are `any` or named always match")] = None
    cache_control: Annotated[Any, Ignored("prefixes are shared by themselves")] = None
    input_examples: Annotated[Any, Ignored("put them into the description")] = None
    allowed_callers: Annotated[Any, Ignored("the model alone calls")] = None
    defer_loading: Annotated[bool | None, Ignored("every tool is told")] = None
    eager_input_streaming: Annotated[bool | None, Ignored("as it can be had")] = None

    @model_validator(mode="before")
    @classmethod
    def _is_own(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("type") not in (None, "custom"):
            raise PydanticCustomError("not_taken", "tools are never run here: give one of your own")
        return given


class MessageToolChoice(Part):
    type: Literal["auto", "any", "tool", "none"] = Field(
        description="Whether a tool may, has to, or must not be called.", examples=["auto"]
    )
    name: Name | None = Field(None, description="With the type `tool`: which.", examples=["add"])
    disable_parallel_tool_use: bool = Field(
        False, description="Whether at most one is called.", examples=[True]
    )


class OutputFormat(Part):
    type: Literal["json_schema"] = Field(description="JSON of a schema.")
    text: SchemaText = Field(
        alias="schema", description="The schema.", examples=[{"type": "object"}]
    )


class OutputConfig(Part):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="For chat templates that have it.", examples=["low"]
    )
    format: OutputFormat | None = Field(None, description="JSON that the output is held to.")


class Thinking(Part):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"] = Field(
        description="Whether the model may think, where its chat template leaves that open.",
        examples=["enabled"],
    )
    budget_tokens: Annotated[Whole | None, Ignored("`max_tokens` bounds both")] = Field(
        None, examples=[1024]
    )
    display: Literal["summarized", "omitted"] | None = Field(
        None, description="`omitted` leaves the thought out of the answer.", examples=["omitted"]
    )


class MessageMetadata(Part):
    user_id: Annotated[str, Field(max_length=512)] | None = Field(
        None, description="A label of the job, for lists and usage.", examples=["user-42"]
    )


System = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[SaidBlock], Field(max_length=1_000, fail_fast=True), Tag("blocks")],
    Discriminator(lambda given: "blocks" if isinstance(given, list) else "text"),
]


class _Chat(ChatBody):
    """What is asked of the model."""

    thinks: bool = False

    @property
    def hints(self) -> dict[str, Any]:
        return super().hints | {"enable_thinking": self.thinks}

    @property
    def grammar_field(self) -> str:
        return "output_config.format.schema" if self.grammar else "tools"


class MessagesBody(Body):
    """Body of /v1/messages."""

    KIND: ClassVar = Kind.GENERATE
    PROMPT_FIELD: ClassVar = "messages"

    max_tokens: Count = Field(description="Most tokens to generate.", examples=[64])
    messages: Annotated[
        list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ] = Field(
        description="The conversation so far, oldest first. An assistant's last message goes on.",
        examples=[[{"role": "user", "content": "Name three uses of a grist mill."}]],
    )
    system: System | None = Field(
        None,
        description="What the model is told before: text, or blocks of text.",
        examples=["Answer in one word."],
    )
    stop_sequences: Annotated[
        list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS, fail_fast=True)
    ] = Field(
        default_factory=list,
        description="Up to 64 strings; the text ends before the first one met.",
        examples=[["\n\n"]],
    )
    temperature: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="0 is greedy: always the most likely token.", examples=[0.0]
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="Sample from the smallest set of tokens with this probability.",
        examples=[0.9],
    )
    top_k: Annotated[Whole, Field(ge=0, le=2**31 - 1)] | None = Field(
        None, description="Sample from this many most likely tokens.", examples=[40]
    )
    tools: Annotated[list[MessageTool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(
        default_factory=list,
        description="Functions that the model may ask to be called.",
        examples=[[{"name": "get_weather", "input_schema": {"type": "object"}}]],
    )
    tool_choice: MessageToolChoice | None = Field(
        None,
        description="Whether one of them may or has to be called.",
        examples=[{"type": "none"}],
    )
    thinking: Thinking | None = Field(
        None, description="Whether the model thinks first.", examples=[{"type": "enabled"}]
    )
    output_config: OutputConfig | None = Field(
        None,
        description="The form of the output.",
        examples=[{"format": {"type": "json_schema", "schema": {"type": "object"}}}],
    )
    metadata: MessageMetadata = Field(  # type: ignore[assignment]  # the job's, in another form
        MessageMetadata(),
        description="Its `user_id` is a label of the job, for lists and usage.",
        examples=[{"user_id": "user-42"}],
    )
    service_tier: Annotated[
        Literal["auto", "standard_only"] | None, Ignored("a job has a priority")
    ] = Field(None, examples=["auto"])
    cache_control: Annotated[Any, Ignored("prefixes are shared by themselves")] = Field(
        None, examples=[{"type": "ephemeral"}]
    )
    user_profile_id: Annotated[Any, Ignored("a job has no user")] = Field(
        None, examples=["user-42"]
    )
    workspace_id: Annotated[Any, Ignored("the key says whose it is")] = Field(None, examples=["w"])
    inference_geo: Annotated[Any, Ignored("it runs where the workers are")] = Field(
        None, examples=["eu"]
    )
    speed: Annotated[
        Literal["standard", "fast"] | None, Ignored("it is always as fast as it can be")
    ] = Field(None, examples=["standard"])
    diagnostics: Annotated[Any, Ignored("nothing is told of caches")] = Field(
        None, examples=[{"previous_message_id": "msg_42"}]
    )
    billing_policy: Annotated[
        Any, Refused("the key says who pays", ({"type": "billing_policy", "bill_to": "self"},))
    ] = Field(None, examples=[{"type": "billing_policy", "bill_to": "user_profile"}])
    fallbacks: Annotated[Any, Ignored("nothing is declined for a policy")] = Field(
        None, examples=["default"]
    )
    fallback_credit_token: Annotated[Any, Ignored("as `fallbacks`")] = Field(
        None, examples=["token"]
    )
    thread: Annotated[Any, Refused("no conversation is kept here: send all of it")] = Field(
        None, examples=[{"type": "create"}]
    )
    compaction: Annotated[Any, Refused("a conversation is never cut")] = Field(
        None, examples=[{"type": "summarize"}]
    )
    context_management: Annotated[Any, Refused("a conversation is never cut")] = Field(
        None, examples=[{"edits": []}]
    )
    container: Annotated[Any, Refused("nothing is run here")] = Field(None, examples=[{"id": "c"}])
    mcp_servers: Annotated[Any, Refused("nothing is called here", ([],))] = Field(
        None, examples=[[{"type": "url", "url": "https://example.com", "name": "mill"}]]
    )
    stream: Annotated[Any, Refused("a job has stream_events, beside its body", (False,))] = Field(
        None, examples=[True]
    )

    @property
    def meant(self) -> ChatBody:
        return self._chat

    @cached_property
    def _chat(self) -> ChatBody:
        """Raises `RequestError` with the field as it is called here."""
        given = {
            "model": self.model,
            "parse_special": self.parse_special,
            "metadata": self.metadata.model_dump(exclude_none=True),
            "messages": chat_messages(self.messages, self.system),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "continue_final_message": self.messages[-1].role == "assistant",
            "include_reasoning": self._tells_thoughts,
            "thinks": self._thinks,
            "tools": [_chat_tool(each) for each in self.tools],
            **self._choice,
            **self._format,
        }
        try:
            chat = _Chat.model_validate(given)
        except ValidationError as error:
            raise _renamed(first_problem(error, given)) from None
        return chat.model_copy(update={"stop": list(self.stop_sequences)})

    @property
    def _thinks(self) -> bool:
        return self.thinking is not None and self.thinking.type != "disabled"

    @property
    def _tells_thoughts(self) -> bool:
        return self._thinks and self.thinking is not None and self.thinking.display != "omitted"

    @property
    def _choice(self) -> dict[str, Any]:
        choice = self.tool_choice
        if choice is None:
            return {}
        if (choice.type == "tool") != (choice.name is not None):
            raise RequestError(
                "tool_choice has a name with the type tool, and only then.",
                param="tool_choice.name",
            )
        named = {"type": "function", "function": {"name": choice.name}}
        words = {"auto": "auto", "any": "required", "none": "none"}
        return {
            "tool_choice": words.get(choice.type, named),
            "parallel_tool_calls": not choice.disable_parallel_tool_use,
        }

    @property
    def _format(self) -> dict[str, Any]:
        config = self.output_config
        if config is None:
            return {}
        form = config.format and {
            "type": "json_schema",
            "json_schema": {"name": "output", "schema": config.format.text},
        }
        return {"reasoning_effort": config.effort, "response_format": form}

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    def check(self) -> None:
        chat = self.meant
        try:
            chat.check()
        except RequestError as error:
            raise _renamed(error) from None


def _chat_tool(tool: MessageTool) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.input_schema,
        },
    }


_NAMES: Final = {
    "tool_choice.function.name": "tool_choice.name",
    "response_format.json_schema.schema": "output_config.format.schema",
    "continue_final_message": "messages",
    "stop": "stop_sequences",
}


def _renamed(error: RequestError) -> RequestError:
    """With the field as it is called here. Messages are told as a whole: their places are others
    in the chat."""
    param = error.param or "messages"
    if param.startswith("messages."):
        param = "messages"
    error.param = _NAMES.get(param, param)
    return error
