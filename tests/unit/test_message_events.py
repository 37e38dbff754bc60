"""A message told as it comes is the one that is told at its end."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import pytest
from anthropic import types
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from app.engines.base import Generation
from app.engines.text.stopping import Output
from app.engines.text.tokenizer import FileTokenizer
from app.errors import Restarted
from app.jobs import FinishReason
from app.requests import replies
from app.requests.bodies import parse
from app.requests.chat import ChatBody
from app.requests.message_events import Event, MessageEvents
from app.requests.prepare import prepare
from app.requests.saying import Saying
from tests.unit import chat_templates, tiny_tokenizers
from tests.unit.test_saying import MARKS, texts

EVENT = TypeAdapter(types.RawMessageStreamEvent)
TOOL = {"name": "grind", "input_schema": {"type": "object"}}
JOB = str(UUID(int=7))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    folder = tmp_path_factory.mktemp("qwen")
    return chat_templates.tokenizer_of(folder, chat_templates.QWEN, special=MARKS)


class Streamed:
    """A message of this text, as an engine streams it, and what became of it."""

    def __init__(self, tokenizer: FileTokenizer, text: str, **body: Any) -> None:
        asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1_000, **body}
        request = parse(asked, "/v1/messages")
        made = prepare(request, tokenizer, tiny_tokenizers.SETTINGS)
        assert isinstance(request.body, ChatBody) and made.params is not None
        [prompt] = made.prompts
        output = Output(made.params, tokenizer, prompt, stream=True)
        self.news: list[tuple[str, tuple[int, ...]]] = []
        reason = FinishReason.LENGTH
        for token in tokenizer._file.encode(text, add_special_tokens=False).ids:
            ended = output.append(token)
            self.news.append((output.take_text(), (token,)))
            if ended:
                reason = ended
                break
        self.news.append((output.take_rest(), ()))
        answer = Generation(1, reason, output.token_ids, output.text)
        self.message: dict[str, Any] = replies.body(
            request, [answer], job_id=JOB, model="m", created=0, tokenizer=tokenizer,
            prompts=made.prompts,
        )  # fmt: skip
        saying = Saying(request.body, tokenizer, prompt)
        self.events = MessageEvents(saying, job_id=JOB, model="m", input_tokens=len(prompt))

    def told(self) -> list[Event]:
        told = list(self.events.begin())
        for news in self.news:
            told += self.events.take(*news)
        return told + list(self.events.end(self.message))


def gathered(events: list[Event]) -> list[dict[str, Any]]:
    """The blocks that a client makes of events, which it has to be able to read."""
    blocks: list[dict[str, Any]] = []
    written: dict[int, str] = {}
    is_open = False
    for event in events:
        if event["type"] != "ping":
            EVENT.validate_python(event)
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks) and not is_open
                blocks.append(dict(event["content_block"]))
                is_open = True
            case "content_block_delta":
                assert event["index"] == len(blocks) - 1 and is_open
                delta = dict(event["delta"])
                match delta.pop("type"):
                    case "input_json_delta":
                        written[event["index"]] = delta["partial_json"]
                    case _:
                        [(name, text)] = delta.items()
                        assert text
                        blocks[-1][name] += text
            case "content_block_stop":
                is_open = False
    for index, text in written.items():
        blocks[index]["input"] = json.loads(text)
    return blocks


@settings(max_examples=150)
@given(text=texts, thinks=st.booleans(), tools=st.booleans())
@example(text="</tool_call><tool_call></think>", thinks=True, tools=True)
def test_what_is_told_as_it_comes_is_what_is_told_at_the_end(
    tokenizer: FileTokenizer, text: str, thinks: bool, tools: bool
) -> None:
    streamed = Streamed(
        tokenizer,
        text,
        stop_sequences=["STOP"],
        thinking={"type": "enabled" if thinks else "disabled"},
        tools=[TOOL] if tools else [],
    )

    events = streamed.told()

    whole, blocks = streamed.message["content"], gathered(events)
    assert events[0]["message"]["id"] == streamed.message["id"]
    assert events[-1] == {"type": "message_stop"}
    assert events[-2]["delta"]["stop_reason"] == streamed.message["stop_reason"]
    if not streamed.events._saying.thinks_aloud:
        if any(each["type"] == "tool_use" for each in whole):
            for each in blocks:
                if each["type"] == "text":  # that a call follows was not known yet
                    each["text"] = each["text"].lstrip()
        assert [_said(each) for each in blocks] == [_said(each) for each in whole]


def _said(block: dict[str, Any]) -> tuple[str, Any]:
    field = {"thinking": "thinking", "text": "text", "tool_use": "input"}[block["type"]]
    return block["type"], block[field]


def test_a_message_that_runs_anew_goes_on_or_says_that_it_cannot(tokenizer: FileTokenizer) -> None:
    streamed, other = Streamed(tokenizer, "flour is ground"), Streamed(tokenizer, "water is wet")
    told = list(streamed.events.begin())
    for news in streamed.news[:6]:
        told += streamed.events.take(*news)

    streamed.events.again()
    for news in streamed.news:
        told += streamed.events.take(*news)
    told += streamed.events.end(streamed.message)

    assert [each["text"] for each in gathered(told)] == ["flour is ground"]
    list(streamed.events.begin())
    streamed.events.again()
    with pytest.raises(Restarted):
        [list(streamed.events.take(*news)) for news in other.news]
