"""The call /v1/responses, as OpenAI's Responses API has it:
https://platform.openai.com/docs/api-reference/responses/create.

What it asks is asked of a model as a chat. What only its door obeys, as `background`, is kept with
it, since an answer gives it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Discriminator, Field, Tag, ValidationError

from app.errors import RequestError
from app.requests.chat import ChatBody
from app.requests.handling import Ignored, Refused, Whole
from app.requests.part import Part
from app.requests.problems import first_problem
from app.requests.response_items import MAX_ITEMS, Item, MessageItem, chat_messages, check_items
from app.requests.response_tools import NAMES, Choice, OwnTool, TextConfig
from app.requests.sampled import Count, DrawnBody
from app.requests.tools import MAX_TOOLS

RESPONSE_PREFIX: Final = "resp_"
_LOGPROBS: Final = "message.output_text.logprobs"

Items = Annotated[list[Item], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class BackgroundOptions(Part):
    """When an answer in the background is wanted."""

    completion_window: Literal["soonest", "2h", "8h"] | None = Field(
        None,
        description="Within two or eight hours is time enough: others go first, and then it "
        "expires.",
        examples=["8h"],
    )
    continuation_id: Annotated[str, Field(max_length=200)] | None = Field(
        None, description="What belongs together; given back, and no more.", examples=["survey-7"]
    )


class Reasoning(Part):
    """How much the model thinks, where its chat template leaves that open."""

    effort: Effort | None = Field(
        None,
        description="For chat templates that have it; `none` turns thinking off where one can.",
        examples=["low"],
    )
    summary: Annotated[
        Literal["auto", "concise", "detailed"] | None, Ignored("thoughts are told whole")
    ] = None
    generate_summary: Annotated[
        Literal["auto", "concise", "detailed"] | None, Ignored("thoughts are told whole")
    ] = None
    mode: Annotated[str | None, Ignored("`effort` says it"), Field(max_length=64)] = None
    context: Annotated[
        Literal["auto", "current_turn", "all_turns"] | None, Ignored("the template decides")
    ] = None


class _Chat(ChatBody):
    """What is asked of the model, with its fields as they are called here."""

    PROMPT_FIELD: ClassVar = "input"

    @property
    def grammar_field(self) -> str:
        return "text.format.schema" if self.grammar else "tools"

    @property
    def most_tokens_field(self) -> str:
        return "max_output_tokens"


class ResponsesBody(DrawnBody):
    """Body of /v1/responses."""

    PROMPT_FIELD: ClassVar = "input"

    input: Annotated[
        Annotated[str, Tag("text")] | Annotated[Items, Tag("items")],
        Discriminator(lambda given: "items" if isinstance(given, list) else "text"),
    ] = Field(
        description="What is asked: a text, or items of a conversation: messages, calls, their "
        "outputs and thoughts.",
        examples=["Name three uses of a grist mill."],
    )
    instructions: str | None = Field(
        None,
        description="What the model is told before all else; that of an earlier response does not "
        "hold.",
        examples=["Answer briefly."],
    )
    previous_response_id: Annotated[str, Field(max_length=200)] | None = Field(
        None,
        description="The response that this one goes on from. `POST /v1/responses` looks it up; "
        "elsewhere its conversation is to be given as `history`.",
        examples=["resp_0b9f1c5e6c8f4d3a9a3f0d9b7f2f6a11"],
    )
    history: Items | None = Field(
        None,
        description="Items before `input`: the conversation of `previous_response_id`.",
        examples=[[{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Yes"}]],
    )
    max_output_tokens: Count | None = Field(
        None,
        description="Most tokens to generate; the model's `default_max_tokens` when left out.",
        examples=[64],
    )
    tools: Annotated[list[OwnTool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(
        default_factory=list,
        description="Functions that the model may ask to be called.",
        examples=[[{"type": "function", "name": "get_weather"}]],
    )
    tool_choice: Choice | None = Field(
        None,
        description="`none`, `auto`, `required`, one that has to be called, or those allowed.",
        examples=["none"],
    )
    parallel_tool_calls: bool = Field(
        True, description="Whether several may be called at once.", examples=[False]
    )
    text: TextConfig | None = Field(
        None,
        description="Let the output be JSON, of a schema or of none; it comes on one line.",
        examples=[{"format": {"type": "json_object"}}],
    )
    reasoning: Reasoning | None = Field(
        None, description="How much the model thinks.", examples=[{"effort": "low"}]
    )
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = Field(
        None, description="This many likeliest tokens at each place.", examples=[2]
    )
    include: Annotated[
        list[
            Literal[
                "message.output_text.logprobs",
                "reasoning.encrypted_content",
                "message.input_image.image_url",
                "file_search_call.results",
                "web_search_call.results",
                "web_search_call.action.sources",
                "computer_call_output.output.image_url",
                "code_interpreter_call.outputs",
            ]
        ],
        Field(max_length=32, fail_fast=True),
    ] = Field(
        default_factory=list,
        description="`message.output_text.logprobs` tells the log probability of each output "
        "token; there is nothing to tell of the others.",
        examples=[["message.output_text.logprobs"]],
    )
    background: bool = Field(
        False, description="Answer at once, and run it meanwhile.", examples=[True]
    )
    background_options: BackgroundOptions | None = Field(
        None,
        description="When an answer in the background is wanted.",
        examples=[{"completion_window": "8h"}],
    )
    store: bool = Field(
        True, description="Whether the answer may be retrieved later.", examples=[False]
    )
    service_tier: (
        Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None
    ) = Field(
        None,
        description="`flex` waits behind the others, `priority` and `fast` go first; given back.",
        examples=["flex"],
    )
    user: Annotated[str, Field(max_length=200)] | None = Field(
        None, description="Given back.", examples=["user-42"]
    )
    safety_identifier: Annotated[str, Field(max_length=200)] | None = Field(
        None, description="Given back.", examples=["user-42"]
    )
    prompt_cache_key: Annotated[str, Field(max_length=200)] | None = Field(
        None, description="Given back; prompts share what they have in common.", examples=["mill"]
    )
    max_tool_calls: Annotated[Count | None, Ignored("nothing is called here")] = Field(
        None, examples=[3]
    )
    stream: Annotated[bool | None, Ignored("`POST /v1/responses` streams; a job is polled")] = (
        Field(None, examples=[True])
    )
    stream_options: Annotated[
        dict[str, bool] | None, Ignored("nothing is obfuscated"), Field(max_length=16)
    ] = Field(None, examples=[{"include_obfuscation": False}])
    prompt_cache_retention: Annotated[
        Literal["in_memory", "24h"] | None, Ignored("prefixes are shared by themselves")
    ] = Field(None, examples=["24h"])
    prompt_cache_options: Annotated[
        dict[str, Any] | None, Ignored("prefixes are shared by themselves"), Field(max_length=16)
    ] = Field(None, examples=[{"mode": "implicit"}])
    access_programs: Annotated[
        dict[str, str] | None, Ignored("nothing is closed to you"), Field(max_length=16)
    ] = Field(None, examples=[{"cyber": "standard"}])
    image: Annotated[dict[str, str] | None, Ignored("no image is taken"), Field(max_length=16)] = (
        Field(None, examples=[{"context_compression": "auto"}])
    )
    truncation: Literal["auto", "disabled"] | None = Field(
        None,
        description="`auto` leaves out the oldest turns of a conversation that is too long for the "
        "model; otherwise it is refused.",
        examples=["auto"],
    )
    context_management: Annotated[Any, Refused("truncation says it", ([],))] = Field(
        None, examples=[[{"type": "compaction"}]]
    )
    personality: Annotated[Any, Refused("say it in instructions")] = Field(
        None, examples=["friendly"]
    )
    multi_agent: Annotated[Any, Refused("one model answers", ({"enabled": False},))] = Field(
        None, examples=[{"enabled": True}]
    )
    conversation: Annotated[
        Any, Refused("no conversations are kept: give previous_response_id, or all of it as input")
    ] = Field(None, examples=["conv_1"])
    prompt: Annotated[Any, Refused("no prompt templates are kept: give the text as input")] = Field(
        None, examples=[{"id": "pmpt_1"}]
    )
    moderation: Annotated[Any, Refused("nothing is moderated")] = Field(
        None, examples=[{"model": "omni-moderation-latest"}]
    )

    @property
    def items(self) -> list[Item]:
        """What is asked, as items."""
        if isinstance(self.input, str):
            return [MessageItem(role="user", content=self.input)]
        return self.input

    @property
    def shorter(self) -> Sequence[ResponsesBody]:
        """The same without its oldest turns, if it may be cut: each begins with another message of
        the user."""
        if self.truncation != "auto":
            return ()
        items = [*(self.history or ()), *self.items]
        starts = (
            place
            for place, item in enumerate(items)
            if place and isinstance(item, MessageItem) and item.role == "user"
        )
        return [self._from(items[start:]) for start in starts]

    def _from(self, items: list[Item]) -> ResponsesBody:
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return ResponsesBody.model_construct(**given | {"history": None, "input": items})

    @property
    def tells_logprobs(self) -> bool:
        return bool(self.top_logprobs) or _LOGPROBS in self.include

    @property
    def most_tokens(self) -> int | None:
        return self.max_output_tokens

    @property
    def meant(self) -> ChatBody:
        return self._chat

    @cached_property
    def _chat(self) -> ChatBody:
        """Raises `RequestError` with the field as it is called here."""
        drawn = self.model_fields_set & (DrawnBody.model_fields.keys() - _OURS)
        given = {
            **{name: getattr(self, name) for name in drawn},
            "messages": chat_messages(self.instructions, [*(self.history or ()), *self.items]),
            "max_completion_tokens": self.max_output_tokens,
            "tools": [each.of_chat for each in self.tools],
            "tool_choice": (
                self.tool_choice.of_chat
                if self.tool_choice and not isinstance(self.tool_choice, str)
                else self.tool_choice
            ),
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self.text and self.text.format and self.text.format.of_chat,
            "reasoning_effort": self.reasoning and self.reasoning.effort,
            "logprobs": self.tells_logprobs,
            "top_logprobs": self.top_logprobs if self.tells_logprobs else None,
        }
        try:
            return _Chat.model_validate(given)
        except ValidationError as error:
            raise _renamed(first_problem(error, given)) from None

    def check(self) -> None:
        for field, items in (("history", self.history), ("input", self.input)):
            if isinstance(items, list):
                check_items(items, field)
        if self.previous_response_id is not None and self.history is None:
            raise RequestError(
                "previous_response_id is looked up by POST /v1/responses; elsewhere give the "
                "conversation before as history.",
                param="previous_response_id",
            )
        self._check_background()
        try:
            self.meant.check()
        except RequestError as error:
            raise _renamed(error) from None

    def _check_background(self) -> None:
        options = self.background_options
        if options is not None and not self.background:
            raise RequestError("background_options need background.", param="background_options")
        if self.background and not self.store:
            raise RequestError(
                "What runs in the background is stored, to be retrieved: leave out store.",
                param="store",
            )
        if options is not None and options.completion_window in ("2h", "8h"):
            if self.stream:
                raise RequestError("A completion_window of hours is not streamed.", param="stream")
            if self.service_tier not in (None, "auto", "default"):
                raise RequestError(
                    "A completion_window of hours goes with the default service_tier.",
                    param="service_tier",
                )


_OURS: Final = frozenset({"user", "safety_identifier", "request_id", "priority"})
"""Of every body, and not of what is asked of a model."""


def _renamed(error: RequestError) -> RequestError:
    """With the field as it is called here. Messages are told as a whole: their places are others
    in the chat."""
    param = error.param or "input"
    name = "input" if param.partition(".")[0] == "messages" else NAMES.get(param, param)
    if param != name:
        told = error.message.replace(param, name)
        return type(error)(told, param=name)
    return error
