"""No answer that an engine can make fails to be stored."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from app.config.settings import ModelSettings
from app.engines.base import Generation, TokenLogprob
from app.engines.text.tokenizer import StubTokenizer
from app.jobs import FinishReason, Kind
from app.requests import bodies, replies
from app.store.encoding import encode

CHAT = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 3}
BODIES = [CHAT, {"prompt": "x", "logprobs": 3}]

tokens = st.integers(0, StubTokenizer.EOS)
numbers = st.floats() | st.sampled_from([float("-inf"), float("inf"), float("nan"), -1e30])
scored = st.builds(
    TokenLogprob, tokens, numbers, st.lists(st.tuples(tokens, numbers), max_size=3).map(tuple)
)
generations = st.builds(
    Generation,
    st.just(1),
    st.sampled_from([each for each in FinishReason if each is not FinishReason.ERROR]),
    token_ids=st.lists(tokens, max_size=6),
    text=st.text(),
    logprobs=st.none() | st.lists(scored, max_size=6),
    input_tokens=st.integers(0, 2**30),
    cached_tokens=st.integers(0, 2**30),
)


@dataclass(frozen=True, slots=True)
class Record:
    response: Any


@given(answer=generations, body=st.sampled_from(BODIES))
@settings(max_examples=200, deadline=None)
def test_an_answer_is_stored_whatever_its_text_and_numbers_are(
    answer: Generation, body: dict[str, Any]
) -> None:
    request = bodies.parse({"model": "m", **body})
    model = ModelSettings(source="stub", kind=Kind.GENERATE, engine="stub")

    made = replies.body(
        request,
        [answer],
        job_id="00000000-0000-0000-0000-000000000001",
        model="m",
        created=0,
        tokenizer=StubTokenizer(model),
        prompts=[(65,)],
    )

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    stored = json.loads(encode([Record(made)]), parse_constant=refuse)
    assert stored[0]["response"]["usage"]["prompt_tokens_details"] == {
        "cached_tokens": min(answer.cached_tokens, answer.input_tokens)
    }
