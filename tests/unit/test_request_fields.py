"""Each field that a request may have, and the table that tells of it."""

from __future__ import annotations

from typing import Any, Final
from uuid import UUID

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from app.config.settings import ModelSettings
from app.engines.base import Generation, TokenLogprob
from app.engines.checkpoint.card import Card
from app.engines.text.tokenizer import StubTokenizer, Tokenizer
from app.errors import RequestError
from app.jobs import FinishReason, Kind
from app.requests import replies
from app.requests.bodies import BODIES, Request, Url, parse
from app.requests.handling import Ignored, Refused, handling_of
from app.requests.prepare import prepare
from tests import request_table
from tests.unit import chat_templates

STUB: Final = ModelSettings(source="stub", kind=Kind.GENERATE, engine="stub")
TOOLS: Final = [{"type": "function", "function": {"name": "grind"}}]
LONG: Final = 200 * "flour "
BASES: Final[dict[Url, dict[str, Any]]] = {
    Url.CHAT: {
        "messages": [
            {"role": "user", "content": "What is flour?"},
            {"role": "assistant", "content": "Flour is"},
        ]
    },
    Url.COMPLETIONS: {"prompt": "flour"},
    Url.EMBEDDINGS: {"input": LONG},
    Url.CLASSIFY: {"input": LONG},
    Url.RERANK: {"query": "flour", "documents": [LONG, "water"]},
    Url.TRANSLATIONS: {"input": "flour"},
    Url.SCORE: {"text_1": "flour", "text_2": [LONG, "water"]},
    Url.MESSAGES: {"messages": [{"role": "user", "content": "What is flour?"}], "max_tokens": 64},
    Url.RESPONSES: {"input": "flour"},
}
CARD: Final = Card(prompts={"query": "Find: "}, size=512, shorter=None)
COMPANIONS: Final[dict[tuple[Url, str], dict[str, Any]]] = {
    (Url.CHAT, "top_logprobs"): {"logprobs": True},
    (Url.CHAT, "tool_choice"): {"tools": TOOLS},
    (Url.MESSAGES, "tool_choice"): {"tools": [{"name": "grind", "input_schema": {}}]},
    (Url.RESPONSES, "tool_choice"): {"tools": [{"type": "function", "name": "grind"}]},
    (Url.RESPONSES, "background_options"): {"background": True},
    (Url.RESPONSES, "previous_response_id"): {"history": [{"role": "user", "content": "Hello."}]},
}
"""Fields that mean something beside others alone."""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Tokenizer]:
    """One with a chat template that has all that templates may have, and a plain one."""
    folder = tmp_path_factory.mktemp("qwen")
    found: dict[Kind, Tokenizer] = dict.fromkeys(Kind, StubTokenizer(STUB))
    return found | {Kind.GENERATE: chat_templates.tokenizer_of(folder, chat_templates.QWEN)}


ROWS: Final = [
    pytest.param(url, name, id=f"{url.rpartition('/')[2]}-{name}")
    for name, urls in request_table.fields().items()
    for url in urls
]


def test_the_page_tells_of_the_fields_that_the_code_knows() -> None:
    page = request_table.PAGE.read_text()
    told = page.partition(request_table.BEGIN)[2].partition(request_table.END)[0]

    assert told.strip() == request_table.table(), "run python -m tests.request_table"


@pytest.mark.parametrize(("url", "name"), ROWS)
def test_a_field_is_treated_as_the_table_says(
    url: Url, name: str, tokenizers: dict[Kind, Tokenizer]
) -> None:
    # given a request with the field, and the same without
    field = BODIES[url].model_fields[name]
    value = (field.examples or [None])[0]
    bare = BASES[url] | COMPANIONS.get((url, name), {})
    asked = bare if field.is_required() else bare | {name: value}

    # when it is taken, then it means something else; when ignored, the same; else it is refused
    match handling_of(field):
        case Ignored():
            assert value is not None
            assert meaning(parse(asked, url), tokenizers) == meaning(parse(bare, url), tokenizers)
        case Refused(why, neutral):
            with pytest.raises(RequestError) as refused:
                parse(asked, url)
            assert refused.value.param == name
            assert why in refused.value.message
            for each in neutral:
                given = parse(bare | {name: each}, url)
                assert given.raw == parse(bare, url).raw
        case _:
            assert field.is_required() or meaning(parse(asked, url), tokenizers) != meaning(
                parse(bare, url), tokenizers
            )
    # and null is as good as nothing
    if field.is_required():
        with pytest.raises(RequestError, match=f"The field {name} is required"):
            parse(bare | {name: None}, url)
    else:
        assert parse(bare | {name: None}, url).raw == parse(bare, url).raw


def meaning(request: Request, tokenizers: dict[Kind, Tokenizer]) -> object:
    """All that a request changes."""
    tokenizer = tokenizers[request.kind]
    prepared = prepare(request, tokenizer, STUB, CARD)
    score = TokenLogprob(65, -1.0, ((65, -1.0), (66, -2.0)))
    text = "<think>Grain.</think>Flour."
    answer = Generation(
        1, FinishReason.STOP, [65], text, [score], embedding=[0.5], scores=[0.25, 0.75]
    )
    response = replies.body(
        request,
        [answer] * request.num_sequences,
        job_id=str(UUID(int=1)),
        model="stub",
        created=0,
        tokenizer=tokenizer,
        prompts=prepared.prompts,
    )
    body = request.body
    return (
        request.prompts,
        request.num_answers,
        prepared,
        response,
        (body.model, body.parse_special, body.metadata, getattr(body, "offer", None)),
        request.sent.is_stored_chat,
    )


@pytest.mark.parametrize("url", Url)
@given(name=st.text(st.characters(), min_size=1, max_size=5) | st.just("\ud800"))
def test_an_unknown_field_is_told_whatever_its_name(url: Url, name: str) -> None:
    assume(name not in BODIES[url].model_fields)
    with pytest.raises(RequestError, match="Unknown field") as refused:
        parse({name: 1}, url)

    assert str(refused.value).isascii()
