"""The call /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field

from app.errors import RequestError
from app.requests.conversation import ChatMessage, Conversation, Ending, check_messages
from app.requests.handling import Ignored, Refused, Whole
from app.requests.prompts import Prompt
from app.requests.sampled import Count, SampledBody
from app.requests.tools import MAX_TOOLS, Offer, Tool, ToolChoice, offer_of

_OWN_VARIABLES: Final = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
)


def _variables(given: Any) -> Any:
    if isinstance(given, dict):
        for name in given:
            if name in _OWN_VARIABLES or not name.isidentifier() or name.endswith("_token"):
                raise ValueError("Its names should be those of a template's own variables")
    return given


class ChatBody(SampledBody):
    """Body of /v1/chat/completions."""

    PROMPT_FIELD: ClassVar = "messages"

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000, fail_fast=True)] = (
        Field(description="The conversation so far, oldest first.")
    )
    max_completion_tokens: Count | None = Field(
        None, description="The newer name of `max_tokens`; give one of the two.", examples=[64]
    )
    logprobs: bool | None = Field(
        None, description="Return the log probability of each output token.", examples=[True]
    )
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = Field(
        None,
        description="With `logprobs`: this many likeliest tokens at each place.",
        examples=[2],
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(
        default_factory=list,
        description="Functions that the model may ask to be called.",
        examples=[[{"type": "function", "function": {"name": "get_weather"}}]],
    )
    tool_choice: ToolChoice | None = Field(
        None,
        description="`none`, `auto`, `required`, one that has to be called, or those allowed.",
        examples=["none"],
    )
    parallel_tool_calls: bool = Field(
        True, description="Whether several may be called at once.", examples=[False]
    )
    add_generation_prompt: bool | None = Field(
        None, description="Whether the assistant's turn is begun.", examples=[False]
    )
    continue_final_message: bool = Field(
        False, description="Go on with the last message, an assistant's.", examples=[True]
    )
    chat_template_kwargs: Annotated[
        dict[str, Any], BeforeValidator(_variables), Field(max_length=32)
    ] = Field(
        default_factory=dict,
        description="Variables of the model's chat template, as `enable_thinking`.",
        examples=[{"enable_thinking": False}],
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        Field(
            None,
            description="For chat templates that have it; `none` turns thinking off where one can.",
            examples=["low"],
        )
    )
    include_reasoning: bool = Field(
        True, description="Whether an answer has `reasoning_content`.", examples=[False]
    )
    store: bool | None = Field(
        None,
        description="Whether the answer is told by the calls for stored chat completions.",
        examples=[True],
    )
    prediction: Annotated[
        dict[str, Any] | None, Ignored("it would only save time"), Field(max_length=16)
    ] = Field(None, examples=[{"type": "content", "content": "A mill."}])
    prompt_cache_retention: Annotated[
        Literal["in_memory", "24h"] | None, Ignored("as `prompt_cache_key`")
    ] = Field(None, examples=["24h"])
    prompt_cache_options: Annotated[
        dict[str, str] | None, Ignored("as `prompt_cache_key`"), Field(max_length=16)
    ] = Field(None, examples=[{"mode": "implicit"}])
    modalities: Annotated[Any, Refused("answers are text", (["text"],))] = Field(
        None, examples=[["text", "audio"]]
    )
    audio: Annotated[Any, Refused("answers are text")] = Field(
        None, examples=[{"voice": "alloy", "format": "wav"}]
    )
    functions: Annotated[Any, Refused("give tools", ([],))] = Field(
        None, examples=[[{"name": "get_weather"}]]
    )
    function_call: Annotated[Any, Refused("give tool_choice", ("none", "auto"))] = Field(
        None, examples=[{"name": "get_weather"}]
    )
    web_search_options: Annotated[Any, Refused("nothing is searched")] = Field(None, examples=[{}])
    moderation: Annotated[Any, Refused("nothing is moderated")] = Field(
        None, examples=[{"model": "omni-moderation-latest"}]
    )
    verbosity: Annotated[Any, Refused("say it in a message", ("medium",))] = Field(
        None, examples=["low"]
    )
    documents: Annotated[Any, Refused("put them into a message", ([],))] = Field(
        None, examples=[[{"text": "A mill."}]]
    )
    chat_template: Annotated[Any, Refused("the model's own is used")] = Field(
        None, examples=["{{ messages }}"]
    )
    add_special_tokens: Annotated[Any, Refused("the chat template writes them", (False,))] = Field(
        None, examples=[True]
    )

    @property
    def is_stored_chat(self) -> bool:
        return self.store is True

    @property
    def offer(self) -> Offer:
        """What may be called."""
        return offer_of(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def grammar_field(self) -> str:
        return super().grammar_field if self.grammar else "tools"

    @property
    def prompts(self) -> list[Prompt]:
        offered = self.offer.functions
        return [
            Conversation(
                messages=tuple(self.messages),
                tools=tuple(each for each in self.tools if each.function in offered),
                variables=self.chat_template_kwargs,
                hints=self.hints,
                ending=self._ending,
            )
        ]

    @property
    def hints(self) -> dict[str, Any]:
        """Variables for chat templates that know them."""
        effort = self.reasoning_effort
        told: dict[str, Any] = {"reasoning_effort": effort} if effort else {}
        return told | ({"enable_thinking": False} if effort == "none" else {})

    @property
    def _ending(self) -> Ending:
        if self.continue_final_message:
            return "continued"
        return "closed" if self.add_generation_prompt is False else "answer"

    @property
    def most_tokens(self) -> int | None:
        newer = self.max_completion_tokens
        return newer if newer is not None else self.max_tokens

    @property
    def most_tokens_field(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        super().check()
        check_messages(self.messages)
        if self.max_tokens and self.max_completion_tokens not in (None, self.max_tokens):
            raise RequestError(
                "Give max_tokens or max_completion_tokens, not both.",
                param="max_completion_tokens",
            )
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs.", param="top_logprobs")
        if self.continue_final_message:
            self._check_continued()
        offered = self.offer
        if offered.is_required and self.grammar is not None:
            raise RequestError(
                "A call that is required leaves no room for an output format.", param="tool_choice"
            )

    def _check_continued(self) -> None:
        if self.messages[-1].role != "assistant" or self.messages[-1].tool_calls:
            raise RequestError(
                "Only what an assistant says last can be continued.", param="continue_final_message"
            )
        if self.add_generation_prompt:
            raise RequestError(
                "Either the last message goes on or the assistant's turn is begun.",
                param="add_generation_prompt",
            )
