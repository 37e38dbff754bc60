"""What is told of an answer while it comes is the beginning of what it turns out to be."""

from __future__ import annotations

from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engines.base import Generation
from app.engines.text.stopping import Output
from app.engines.text.tokenizer import FileTokenizer
from app.errors import Restarted
from app.jobs import FinishReason
from app.requests import replies
from app.requests.bodies import parse
from app.requests.chat import ChatBody
from app.requests.prepare import prepare
from app.requests.saying import Delta, Saying
from tests.unit import chat_templates, tiny_tokenizers
from tests.unit.chats import TOOL, USER

MARKS: Final = ("<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]")
TEMPLATES: Final = {
    "qwen": (chat_templates.QWEN, ()),
    "qwen, marks special": (chat_templates.QWEN, MARKS),
    "r1": (chat_templates.R1, ()),
    "r1, marks special": (chat_templates.R1, MARKS),
    "llama": (chat_templates.LLAMA, ()),
    "mistral": (chat_templates.MISTRAL, ("[TOOL_CALLS]",)),
    "plain": (chat_templates.PLAIN, ()),
}
CALLED: Final = '<tool_call>\n{"name": "grind", "arguments": {"fine": true}}\n</tool_call>'
BARE: Final = '{"name": "grind", "parameters": {"fine": true}}'
PIECES: Final = (
    *(*MARKS, CALLED, BARE, "<think>\n", "\n</think>\n\n", "<tool", "</thi", "[TOOL_"),
    *("I do.", " ", "\n", "\n\n", "flour", "é", "🌾", "<", "{", "\0", "STOP", "ST"),
    '[TOOL_CALLS][{"name": "grind", "arguments": {"fine": true}}]',
)
texts = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileTokenizer]:
    return {
        name: chat_templates.tokenizer_of(
            tmp_path_factory.mktemp("tokenizer"), template, special=special
        )
        for name, (template, special) in TEMPLATES.items()
    }


class Streamed:
    """An answer of this text, as an engine streams it, and what became of it. Tools are offered
    where the template has any."""

    def __init__(self, tokenizer: FileTokenizer, text: str, **body: Any) -> None:
        if tokenizer.template is None or not tokenizer.template.takes_tools:
            body.pop("tools", None)
        request = parse({"messages": [USER], "max_tokens": 1_000, **body})
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
        told = replies.body(
            request, [answer], job_id="1", model="m", created=0, tokenizer=tokenizer,
            prompts=made.prompts,
        )  # fmt: skip
        self.message: dict[str, Any] = told["choices"][0]["message"]
        self.saying = Saying(request.body, tokenizer, prompt)

    def told(self) -> Delta:
        """All that is told of it up to its end."""
        deltas = [self.saying.take(*new) for new in self.news]
        return _joined(deltas)

    def rest(self) -> Delta:
        return self.saying.rest(self.message["content"], self.message.get("reasoning_content"))


def _joined(deltas: list[Delta]) -> Delta:
    return Delta(
        "".join(each.content for each in deltas), "".join(each.reasoning for each in deltas)
    )


@settings(max_examples=300)
@given(name=st.sampled_from(sorted(TEMPLATES)), text=texts, has_tools=st.booleans(), data=st.data())
def test_what_is_told_and_the_rest_are_the_answer(
    tokenizers: dict[str, FileTokenizer], name: str, text: str, has_tools: bool, data: st.DataObject
) -> None:
    body: dict[str, Any] = {"tools": [TOOL]} if has_tools else {}
    if data.draw(st.booleans()):
        body["stop"] = ["STOP"]
    streamed = Streamed(tokenizers[name], text, **body)

    told, rest = streamed.told(), streamed.rest()

    message = streamed.message
    content = told.content + rest.content
    whole = message["content"] or ""
    if message.get("reasoning_content") and not told.reasoning and told.content:
        return  # a thought without its first mark: content, until its end mark came
    assert told.reasoning + rest.reasoning == (message.get("reasoning_content") or "")
    if message.get("tool_calls"):
        assert content.strip() == whole or content.split() == whole.split()
    else:
        assert content == whole


@given(name=st.sampled_from(sorted(TEMPLATES)), text=texts, data=st.data())
def test_an_answer_that_is_begun_anew_is_gone_on_with_and_not_repeated(
    tokenizers: dict[str, FileTokenizer], name: str, text: str, data: st.DataObject
) -> None:
    once = Streamed(tokenizers[name], text, tools=[TOOL])
    expected = once.told()
    if once.saying.thinks_aloud:
        return
    streamed = Streamed(tokenizers[name], text, tools=[TOOL])
    lost_after = data.draw(st.integers(0, len(streamed.news)))

    before = [streamed.saying.take(*new) for new in streamed.news[:lost_after]]
    streamed.saying.again()
    after = streamed.told()

    assert _joined([*before, after]) == expected


def test_an_answer_that_is_begun_anew_and_another_is_not_gone_on_with(
    tokenizers: dict[str, FileTokenizer],
) -> None:
    saying = Streamed(tokenizers["plain"], "").saying
    assert saying.take("A mill grinds").content == "A mill grinds"

    saying.again()

    assert saying.take("A mill").content == ""
    with pytest.raises(Restarted):
        saying.take(" turns")


def test_an_answer_that_is_begun_anew_and_ends_before_what_was_told_is_another(
    tokenizers: dict[str, FileTokenizer],
) -> None:
    saying = Streamed(tokenizers["plain"], "").saying
    saying.take("A mill grinds")
    saying.again()
    saying.take("A mill")

    with pytest.raises(Restarted):
        saying.rest("A mill", None)


@pytest.mark.parametrize(
    ("name", "text", "content", "reasoning"),
    [
        ("qwen", "<think>\nFine.\n</think>\n\nI do.", "I do.", "Fine."),
        ("qwen", "I do.\n<tool_call>\n", "I do.\n", ""),
        ("qwen", "a <tool", "a ", ""),
        ("qwen", "a <tools>", "a <tools>", ""),
        ("r1", "Fine.\n\nMore.\n</think>\nI do.", "I do.", "Fine.\n\nMore."),
        ("r1", "Fine.\n", "", "Fine."),
        ("llama", "I do {", "I do {", ""),
        ("llama", ' {"name"', "", ""),
        ("mistral", "I do.[TOOL_CALLS][{", "I do.", ""),
    ],
)
def test_text_is_told_as_soon_as_it_is_certain(
    tokenizers: dict[str, FileTokenizer], name: str, text: str, content: str, reasoning: str
) -> None:
    streamed = Streamed(tokenizers[name], text, tools=[TOOL])

    assert streamed.told() == Delta(content, reasoning)


def test_a_thought_that_nobody_wants_is_not_told(tokenizers: dict[str, FileTokenizer]) -> None:
    text = "<think>\nFine.\n</think>\n\nI do."
    streamed = Streamed(tokenizers["qwen"], text, include_reasoning=False)

    assert streamed.told() == Delta("I do.")
    assert streamed.rest() == Delta()
