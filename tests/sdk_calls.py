"""Each method of the official SDKs that is served, called as their users call it.

A call makes what it needs, and returns what it was answered, which a strict client has checked.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any, Final

import openai
from pydantic import BaseModel

from tests.waiting import eventually


class Mill(BaseModel):
    name: str
    wheels: int


SAID: Final = json.dumps({"name": "Vik", "wheels": 2})
"""What the stub is asked, and says."""
ASKED: Final[dict[str, Any]] = {"model": "stub", "messages": [{"role": "user", "content": SAID}]}
CHAT: Final = ASKED | {"store": True}
MESSAGE: Final = ASKED | {"max_tokens": 64}
RESPONSE: Final[dict[str, Any]] = {"model": "stub", "input": SAID}
LATER: Final = RESPONSE | {"background": True, "service_tier": "flex"}
URL: Final = "https://a.example/"


def drained(stream: Any) -> list[Any]:
    """All events of a stream."""
    with stream as events:
        return list(events)


# ── what calls are about ────────────────────────────────────────────────────────────────────────


def _chat(client: Any) -> str:
    return str(client.chat.completions.create(**CHAT).id)


def _file(client: openai.OpenAI) -> str:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": ASKED}
    content = io.BytesIO(json.dumps(line).encode())
    return client.files.create(file=("in.jsonl", content), purpose="batch").id


def _batch(client: openai.OpenAI) -> str:
    given: dict[str, Any] = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
    return client.batches.create(input_file_id=_file(client), **given).id


def _hook(client: openai.OpenAI) -> str:
    return client.webhooks.create(name="a", url=URL, event_types=["response.completed"]).id


def _messages(client: Any) -> str:
    asked: Any = [{"custom_id": "a", "params": MESSAGE}]
    return str(client.messages.batches.create(requests=asked).id)


def _ended(client: Any) -> str:
    id = _messages(client)
    eventually(lambda: client.messages.batches.retrieve(id).processing_status == "ended")
    return id


# ── OpenAI's ────────────────────────────────────────────────────────────────────────────────────

Call = Callable[[Any], Any]

_TRIED: Final[dict[str, Call]] = {
    "chat.completions.create": lambda it: it.chat.completions.create(**CHAT),
    "chat.completions.parse": lambda it: it.chat.completions.parse(**CHAT, response_format=Mill),
    "chat.completions.stream": lambda it: drained(it.chat.completions.stream(**CHAT)),
    "chat.completions.retrieve": lambda it: it.chat.completions.retrieve(_chat(it)),
    "chat.completions.list": lambda it: it.chat.completions.list(order="desc", limit=2),
    "chat.completions.update": lambda it: it.chat.completions.update(
        _chat(it), metadata={"a": "b"}
    ),
    "chat.completions.delete": lambda it: it.chat.completions.delete(_chat(it)),
    # whose type knows no message but an assistant's
    "chat.completions.messages.list": lambda it: it.chat.completions.messages.list(
        it.chat.completions.create(
            model="stub", messages=[{"role": "assistant", "content": "A mill"}], store=True
        ).id
    ),
    "responses.create": lambda it: it.responses.create(**RESPONSE),
    "responses.retrieve": lambda it: it.responses.retrieve(it.responses.create(**RESPONSE).id),
    "responses.cancel": lambda it: it.responses.cancel(it.responses.create(**LATER).id),
    "responses.delete": lambda it: it.responses.delete(it.responses.create(**RESPONSE).id),
    "responses.input_items.list": lambda it: it.responses.input_items.list(
        it.responses.create(**RESPONSE).id
    ),
    "responses.input_tokens.count": lambda it: it.responses.input_tokens.count(**RESPONSE),
}
"""What the client has below `beta` as well."""

OPENAI: Final[dict[str, Call]] = {
    **_TRIED,
    **{f"beta.{name}": (lambda it, call=call: call(it.beta)) for name, call in _TRIED.items()},
    "completions.create": lambda it: it.completions.create(model="stub", prompt="A mill"),
    "embeddings.create": lambda it: it.embeddings.create(
        model="stub-embed", input="flour", encoding_format="float"
    ),
    "models.list": lambda it: it.models.list(),
    "models.retrieve": lambda it: it.models.retrieve("stub"),
    "responses.parse": lambda it: it.responses.parse(**RESPONSE, text_format=Mill),
    "responses.stream": lambda it: drained(it.responses.stream(**RESPONSE)),
    "files.create": _file,
    "files.retrieve": lambda it: it.files.retrieve(_file(it)),
    "files.list": lambda it: it.files.list(limit=2),
    "files.content": lambda it: it.files.content(_file(it)).read(),
    "files.retrieve_content": lambda it: it.files.retrieve_content(_file(it)),
    "files.delete": lambda it: it.files.delete(_file(it)),
    "files.wait_for_processing": lambda it: it.files.wait_for_processing(_file(it)),
    "batches.create": _batch,
    "batches.retrieve": lambda it: it.batches.retrieve(_batch(it)),
    "batches.list": lambda it: it.batches.list(limit=2),
    "batches.cancel": lambda it: it.batches.cancel(_batch(it)),
    "webhooks.create": _hook,
    "webhooks.retrieve": lambda it: it.webhooks.retrieve(_hook(it)),
    "webhooks.list": lambda it: it.webhooks.list(limit=2),
    "webhooks.update": lambda it: it.webhooks.update(_hook(it), name="b"),
    "webhooks.delete": lambda it: it.webhooks.delete(_hook(it)),
    "webhooks.rotate_secret": lambda it: it.webhooks.rotate_secret(_hook(it)),
    "webhooks.event_types.list": lambda it: it.webhooks.event_types.list(),
}
HOOKS: Final = {"webhooks.test", "webhooks.unwrap", "webhooks.verify_signature"}
"""Methods that need somebody who sends: see `test_webhook_endpoints`."""

# ── Anthropic's ─────────────────────────────────────────────────────────────────────────────────


_STABLE: Final[dict[str, Call]] = {
    "messages.create": lambda it: it.messages.create(**MESSAGE),
    "messages.stream": lambda it: drained(it.messages.stream(**MESSAGE)),
    "messages.parse": lambda it: it.messages.parse(**MESSAGE, output_format=Mill).parsed_output,
    "messages.count_tokens": lambda it: it.messages.count_tokens(**ASKED),
    "messages.batches.create": _messages,
    "messages.batches.retrieve": lambda it: it.messages.batches.retrieve(_messages(it)),
    "messages.batches.list": lambda it: it.messages.batches.list(limit=2),
    "messages.batches.cancel": lambda it: it.messages.batches.cancel(_messages(it)),
    "messages.batches.delete": lambda it: it.messages.batches.delete(_ended(it)),
    "messages.batches.results": lambda it: list(it.messages.batches.results(_ended(it))),
    "models.list": lambda it: it.models.list(),
    "models.retrieve": lambda it: it.models.retrieve("stub"),
}
ANTHROPIC: Final[dict[str, Call]] = {
    **_STABLE,
    **{f"beta.{name}": (lambda it, call=call: call(it.beta)) for name, call in _STABLE.items()},
    "beta.messages.tool_runner": lambda it: it.beta.messages.tool_runner(
        **MESSAGE, tools=[]
    ).until_done(),
    "beta.messages.thread": lambda it: it.beta.messages.thread(
        model="stub", max_tokens=64, unsupported_request_behavior="continue_unthreaded"
    ).send(ASKED["messages"][0]),
}
