"""Bodies as the SDKs' own types describe them, every optional field once."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterator
from typing import Any, Final

import pytest
import typing_extensions
from anthropic.types import beta, message_count_tokens_params, message_create_params
from openai.types import completion_create_params, embedding_create_params
from openai.types.beta import response_create_params as beta_response_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import input_token_count_params, response_create_params

from app.errors import RequestError
from app.requests.bodies import BODIES, Url, parse
from app.requests.handling import Refused, handling_of

TYPES: Final[dict[str, tuple[Url, Any]]] = {
    "chat": (Url.CHAT, chat_create_params.CompletionCreateParamsNonStreaming),
    "completions": (Url.COMPLETIONS, completion_create_params.CompletionCreateParamsNonStreaming),
    "embeddings": (Url.EMBEDDINGS, embedding_create_params.EmbeddingCreateParams),
    "messages": (Url.MESSAGES, message_create_params.MessageCreateParamsNonStreaming),
    "messages count": (Url.MESSAGES, message_count_tokens_params.MessageCountTokensParams),
    "responses": (Url.RESPONSES, response_create_params.ResponseCreateParamsNonStreaming),
    "responses count": (Url.RESPONSES, input_token_count_params.InputTokenCountParams),
}
BETA: Final[list[tuple[Url, Any]]] = [
    (Url.MESSAGES, beta.message_create_params.MessageCreateParamsNonStreaming),
    (Url.MESSAGES, beta.message_count_tokens_params.MessageCountTokensParams),
    (Url.RESPONSES, beta_response_create_params.ResponseCreateParamsNonStreaming),
]
HEADERS: Final = {"betas"}
"""Parameters that are sent as headers, which say nothing here."""
BASES: Final[dict[Url, dict[str, Any]]] = {
    Url.CHAT: {"messages": [{"role": "user", "content": "mill"}], "model": "mill"},
    Url.COMPLETIONS: {"prompt": "mill", "model": "mill"},
    Url.EMBEDDINGS: {"input": "mill", "model": "mill"},
    Url.MESSAGES: {
        "messages": [{"role": "user", "content": "mill"}],
        "model": "mill",
        "max_tokens": 1,
    },
    Url.RESPONSES: {"input": "mill", "model": "mill"},
}
COMPANIONS: Final[dict[tuple[Url, str], dict[str, Any]]] = {
    (Url.CHAT, "top_logprobs"): {"logprobs": True},
    (Url.CHAT, "tool_choice"): {"tools": [{"type": "function", "function": {"name": "mill"}}]},
    (Url.MESSAGES, "tool_choice"): {"tools": [{"name": "mill", "input_schema": {}}]},
    (Url.RESPONSES, "tool_choice"): {"tools": [{"type": "function", "name": "mill"}]},
    (Url.RESPONSES, "background_options"): {"background": True},
}
TEXTS: Final = {"arguments": "{}", "prompt_cache_retention": "24h"}

PLAIN: Final[dict[Any, tuple[Any, ...]]] = {
    int: (1,),
    float: (0.5,),
    bool: (True,),
    object: ("mill",),
}
"""Values of what is no object or list; of a file there are none."""

REFUSED: Final = re.compile(
    "|".join(
        (
            r"messages\.0\.content\.0\.type",  # images, audio, files
            r"messages\.0\.role",  # function, the older name of tool
            r"messages\.0\.(audio|function_call)",
            r"messages\.0\.tool_calls\.0\.type",  # custom
            r"messages\.0\.content\.0(\.content\.0)?(\.source)?",  # the same, of messages
            r"messages",  # calls without their results
            r"tools\.0",  # what a server would run
            r"tools\.0\.type",
            r"tool_choice\.type",
            r"tool_choice(\.allowed_tools)?\.tools\.0\.(function|name)",  # the other's
            r"dimensions",
            r"input",  # null: nothing to count
            r"prompt",  # null: nothing to go on with
            r"input\.0",  # what is run, searched or kept elsewhere
            r"input\.0\.content\.0\.type",
            r"input\.0\.call_id",
            r"tool_choice",
            r"text\.verbosity",
            r"previous_response_id",  # which the door looks up
        )
    )
)
"""What of their fields is refused by name, beside the fields that always are."""


def examples(kind: Any, name: str = "") -> Iterator[Any]:
    """Values of a type: each branch of a union, each optional field of an object once."""
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if kind is type(None):
        yield None
    elif typing_extensions.is_typeddict(kind):
        yield from _objects(kind)
    elif origin in (typing.Union, types.UnionType):
        for branch in arguments:
            yield from examples(branch, name)
    elif _is_required(kind):
        yield from examples(arguments[0], name)
    elif origin is typing.Literal:
        yield from arguments
    elif origin is dict and name == "tools":  # they only say so in words
        yield {"type": "function", "function": {"name": "mill"}}  # of a chat
        yield {"type": "function", "name": "mill"}  # of a response
    elif origin is dict:
        key = "17" if arguments[1] is int else "mill"
        yield {key: next(examples(arguments[1]))}
    elif origin is not None and hasattr(origin, "__iter__"):
        for item in examples(arguments[0], name):
            yield [item]
    else:
        yield from (TEXTS.get(name, "mill"),) if kind is str else PLAIN.get(kind, ())


def _objects(kind: Any) -> Iterator[dict[str, Any]]:
    hints = _hints(kind)
    required = {name: next(examples(it, name)) for name, it in hints.items() if _is_required(it)}
    yield required
    for name, hint in hints.items():
        for value in examples(hint, name):
            yield required | {name: value}


def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _is_required(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Required, typing_extensions.Required)


GIVEN: Final = [
    pytest.param(url, name, list(examples(hint, name)), id=f"{call}-{name}")
    for call, (url, kind) in TYPES.items()
    for name, hint in _hints(kind).items()
]


def refusal(url: Url, name: str, value: Any) -> RequestError | None:
    """Of a body with one field of theirs, as it is sent."""
    body = json.loads(json.dumps(BASES[url] | COMPANIONS.get((url, name), {}) | {name: value}))
    try:
        parse(body, url)
    except RequestError as error:
        return error
    return None


@pytest.mark.parametrize(("url", "name", "values"), GIVEN)
def test_what_the_sdk_can_send_is_taken_or_refused_by_name(
    url: Url, name: str, values: list[Any]
) -> None:
    field = BODIES[url].model_fields.get(name)
    is_refused = field is not None and isinstance(handling_of(field), Refused)

    refusals = [refusal(url, name, value) for value in values]

    # what is not taken is one of few things that are known, and named
    params = [error.param or "" for error in refusals if error is not None]
    assert all(is_refused or REFUSED.fullmatch(param) for param in params)
    assert all(param.startswith(name) for param in params)
    assert len(params) < len(values) or is_refused or name == "dimensions"


@pytest.mark.parametrize(("url", "kind"), BETA)
def test_what_the_sdk_tries_out_is_known_by_name(url: Url, kind: Any) -> None:
    assert _hints(kind).keys() - HEADERS <= BODIES[url].model_fields.keys()


def test_every_message_role_and_kind_of_tool_choice_of_the_sdk_was_among_them() -> None:
    sent = json.dumps([param.values for param in GIVEN])

    for text in ("developer", "assistant", "refusal", "image_url", "allowed_tools", "custom"):
        assert f'"{text}"' in sent
