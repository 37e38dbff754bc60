"""Chunks of a stream, put together again, are the answer that is given at once."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import pytest

from app.api.live.events import NewTokens
from app.api.openai.chunks import Chunks, Wanted
from app.broker.events import EventId, Tokens
from app.engines.base import Generation, TokenLogprob
from app.engines.text.stopping import Output
from app.engines.text.tokenizer import FileTokenizer
from app.errors import Restarted
from app.jobs import FinishReason
from app.requests import replies
from app.requests.bodies import parse
from app.requests.prepare import prepare
from tests.unit import chat_templates, tiny_tokenizers
from tests.unit.chats import TOOL, USER

CALLED: Final = '<tool_call>\n{"name": "grind", "arguments": {"fine": true}}\n</tool_call>'


@pytest.fixture
def qwen(tmp_path: Path) -> FileTokenizer:
    return chat_templates.tokenizer_of(tmp_path, chat_templates.QWEN)


class Answered:
    """An answer of these texts, as an engine streams them, in turns; and as it is given at once."""

    def __init__(
        self, tokenizer: FileTokenizer, *texts: str, wanted: Wanted | None = None, **body: Any
    ) -> None:
        call = {"messages": [USER]} if "prompt" not in body else {}
        request = parse(call | {"max_tokens": 1_000, "n": len(texts)} | body)
        made = prepare(request, tokenizer, tiny_tokenizers.SETTINGS)
        assert made.params is not None
        self.events: list[NewTokens] = []
        generations = []
        for index, text in enumerate(texts):
            output = Output(made.params, tokenizer, made.prompts[0], stream=True)
            scored = []
            for token in tokenizer._file.encode(text, add_special_tokens=False).ids:
                output.append(token)
                scored.append(TokenLogprob(token, -0.5, ((token, -0.5),)))
                self.events.append(_new(index, output.take_text(), token, scored[-1]))
            self.events.append(_new(index, output.take_rest(), None, None))
            generations.append(
                Generation(
                    index,
                    FinishReason.STOP,
                    output.token_ids,
                    output.text,
                    logprobs=scored if made.params.logprobs is not None else None,
                    input_tokens=7,
                )
            )
        self.events.sort(key=lambda each: each.id)
        self.whole = replies.body(
            request, generations, job_id=str(uuid4()), model="m", created=0, tokenizer=tokenizer,
            prompts=made.prompts,
        )  # fmt: skip
        head = {"id": "chatcmpl-1"}
        self.chunks = Chunks(request, tokenizer, made.prompts, head, wanted or Wanted(), 7)

    def told(self) -> list[dict[str, Any]]:
        chunks = [*self.chunks.begun()]
        for event in self.events:
            chunks += self.chunks.tokens(event)
        return [*chunks, *self.chunks.ended(self.whole)]


_numbers: Final = iter(range(1, 10**9))


def _new(index: int, text: str, token: int | None, scored: TokenLogprob | None) -> NewTokens:
    ids = () if token is None else (token,)
    tokens = Tokens(index, text, ids, () if scored is None else (scored,))
    return NewTokens(EventId(1, next(_numbers)), index, text, tokens)


def put_together(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The choice that a client makes of its chunks."""
    made: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": [], "scored": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] == index:
                delta = choice["delta"]
                made["content"] += delta.get("content") or ""
                made["reasoning_content"] += delta.get("reasoning_content", "")
                made["calls"] += delta.get("tool_calls", [])
                made["scored"] += (choice["logprobs"] or {}).get("content", [])
                made["reason"] = choice["finish_reason"]
    return made


def test_thoughts_words_and_calls_are_told_apart(qwen: FileTokenizer) -> None:
    text = f"<think>\nFine flour.\n</think>\n\nI do.\n{CALLED}\n{CALLED}"
    answered = Answered(qwen, text, tools=[TOOL], logprobs=True, top_logprobs=1)

    chunks = answered.told()

    [choice] = answered.whole["choices"]
    made = put_together(chunks)
    assert made["content"].strip() == choice["message"]["content"] == "I do."
    assert made["reasoning_content"] == choice["message"]["reasoning_content"] == "Fine flour."
    calls = choice["message"]["tool_calls"]
    assert made["calls"] == [{"index": place} | call for place, call in enumerate(calls)]
    assert made["reason"] == "tool_calls"
    assert made["scored"] == choice["logprobs"]["content"]
    assert "<tool_call>" not in made["content"]


def test_what_only_looked_like_a_call_is_told_at_the_end(qwen: FileTokenizer) -> None:
    text = "I do.<tool_call>not so"

    made = put_together(Answered(qwen, text, tools=[TOOL]).told())

    assert (made["content"], made["calls"], made["reason"]) == (text, [], "stop")


def test_each_choice_is_told_for_itself(qwen: FileTokenizer) -> None:
    answered = Answered(qwen, "One mill.", "Another.", wanted=Wanted(usage=True))

    *chunks, last = answered.told()

    assert [put_together(chunks, each)["content"] for each in (0, 1)] == ["One mill.", "Another."]
    assert all(each["usage"] is None for each in chunks)
    assert last == {"id": "chatcmpl-1", "choices": [], "usage": answered.whole["usage"]}


def test_an_answer_that_is_begun_anew_is_told_once(qwen: FileTokenizer) -> None:
    answered = Answered(qwen, "A mill grinds rye.", logprobs=True)
    chunks = [*answered.chunks.begun()]
    for event in answered.events[:7]:
        chunks += answered.chunks.tokens(event)

    chunks += answered.told()

    made, [choice] = put_together(chunks), answered.whole["choices"]
    assert made["content"] == "A mill grinds rye."
    assert made["scored"] == choice["logprobs"]["content"]
    roles = [each for each in chunks if "role" in each["choices"][0]["delta"]]
    assert len(roles) == 1


def test_an_answer_that_is_begun_anew_and_another_is_an_error(qwen: FileTokenizer) -> None:
    one, other = Answered(qwen, "A mill grinds rye."), Answered(qwen, "A mill stands.")
    told = [*one.chunks.begun()]
    for event in one.events[:10]:
        told += one.chunks.tokens(event)
    told += one.chunks.begun()

    with pytest.raises(Restarted):
        told += chain.from_iterable(map(one.chunks.tokens, other.events))


def test_a_stream_of_which_all_was_lost_has_the_whole_answer(qwen: FileTokenizer) -> None:
    answered = Answered(qwen, f"I do.\n{CALLED}", tools=[TOOL], logprobs=True)

    made = put_together([*answered.chunks.ended(answered.whole)])

    [choice] = answered.whole["choices"]
    assert made["content"] == "I do." and len(made["calls"]) == 1
    assert made["scored"] == choice["logprobs"]["content"]
