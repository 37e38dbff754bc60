"""What is told of an answer while it comes is the beginning of what it turns out to be."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

import pytest
from hypothesis import example, given, settings
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
        self.body = request.body
        self.message: dict[str, Any] = told["choices"][0]["message"]
        self.saying = Saying(request.body, tokenizer, prompt)

    def told(self, ends: Collection[int] = ()) -> Delta:
        """All that is told of it up to its end: of each token by itself, or of those between
        two ends at once."""
        deltas: list[Delta] = []
        text, token_ids = "", tuple[int, ...]()
        for place, (new, ids) in enumerate(self.news):
            text, token_ids = text + new, token_ids + ids
            if not ends or place in ends or place == len(self.news) - 1:
                deltas.append(self.saying.take(text, token_ids))
                text, token_ids = "", ()
        return _joined(deltas)

    def rest(self) -> Delta:
        return self.saying.rest(self.message["content"], self.message.get("reasoning_content"))

    def assert_whole(self, told: Delta) -> None:
        """Nothing is missing of the answer in what was told, and nothing else was told."""
        thought, content = self.message.get("reasoning_content") or "", self.message["content"]
        if self.saying.thinks_aloud:
            assert not told.reasoning
            assert _unspaced(told.content).startswith(_unspaced(thought))
            assert _unspaced(told.content).endswith(_unspaced(content or ""))
            assert thought or not self.body.include_reasoning
            return
        assert told.reasoning == thought
        if self.message.get("tool_calls"):
            assert told.content.lstrip() == (content or "").lstrip()
        else:
            assert told.content == (content or "")


def _unspaced(text: str) -> str:
    return "".join(text.split())


def _joined(deltas: list[Delta]) -> Delta:
    return Delta(
        "".join(each.content for each in deltas), "".join(each.reasoning for each in deltas)
    )


bodies = st.fixed_dictionaries(
    {"include_reasoning": st.booleans()},
    optional={"tools": st.just([TOOL]), "stop": st.sampled_from([["STOP"], ["</think>\n\nST"]])},
)
ends = st.sets(st.integers(0, 40), max_size=6)


@settings(max_examples=300)
@given(name=st.sampled_from(sorted(TEMPLATES)), text=texts, body=bodies, ends=ends)
@example(name="qwen", text="I do.<tool_call></think>", body={"tools": [TOOL]}, ends=set())
@example(name="qwen", text="<tool_call></think>I do.", body={"tools": [TOOL]}, ends=set())
@example(
    name="qwen",
    text="I do.<tool_call></think>",
    body={"tools": [TOOL], "include_reasoning": False},
    ends=set(),
)
@example(
    name="qwen, marks special",
    text="I do.[TOOL_CALLS]</think>\n\nS",
    body={"stop": ["</think>\n\nST"]},
    ends=set(),
)
def test_what_is_told_and_the_rest_are_the_answer(
    tokenizers: dict[str, FileTokenizer],
    name: str,
    text: str,
    body: dict[str, Any],
    ends: set[int],
) -> None:
    streamed = Streamed(tokenizers[name], text, **body)

    streamed.assert_whole(_joined([streamed.told(ends), streamed.rest()]))


@settings(max_examples=300)
@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    text=texts,
    body=bodies,
    ends=st.tuples(ends, ends),
    lost_after=st.integers(0, 40),
)
def test_an_answer_that_is_begun_anew_is_gone_on_with_and_not_repeated(
    tokenizers: dict[str, FileTokenizer],
    name: str,
    text: str,
    body: dict[str, Any],
    ends: tuple[set[int], set[int]],
    lost_after: int,
) -> None:
    # given an answer that is lost half-way, and comes again in other portions
    streamed = Streamed(tokenizers[name], text, **body)
    news = streamed.news
    streamed.news = news[:lost_after]
    before = streamed.told(ends[0])
    streamed.news = news

    streamed.saying.again()
    after = streamed.told(ends[1])

    streamed.assert_whole(_joined([before, after, streamed.rest()]))


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
        ("qwen", "I do.\n<tool_call>\n", "I do.", ""),
        ("qwen", "a <tool", "a", ""),
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
