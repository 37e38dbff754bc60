"""An answer's text, whatever tokens it has and however its tokenizer writes them."""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as TokenizerFile

from app.engines.base import Generation, TokenLogprob
from app.engines.sampling.grammar import Grammars
from app.engines.text.stopping import Output
from app.engines.text.tokenizer import FileTokenizer
from app.errors import InvalidSchema
from app.jobs import FinishReason, Grammar, SamplingParams
from app.requests import replies
from app.requests.bodies import parse
from tests.unit import tiny_tokenizers
from tests.unit.tiny_tokenizers import BOS, EOS, KINDS

COMPLETE = ("byte_level", "gemma", "llama")
WITH_GRAMMAR = sorted(KINDS.keys() - {"word_ends"})
few = settings(max_examples=30, deadline=None)


@functools.cache
def tokenizer(kind: str, *, encoder_decoder: bool = False) -> FileTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        config = {"is_encoder_decoder": encoder_decoder}
        return tiny_tokenizers.load(KINDS[kind](), Path(folder), config)


def library(kind: str) -> TokenizerFile:
    return tokenizer(kind)._file


def output(kind: str, prompt: list[int], *, stream: bool = False, **params: Any) -> Output:
    return Output(SamplingParams(1_000, **params), tokenizer(kind), prompt, stream=stream)


def pieces(of: Output, token_ids: list[int]) -> list[str]:
    """The text as it streams; the last piece comes with the end."""
    found = []
    for token in token_ids:
        reason = of.append(token)
        found.append(of.take_text())
        if reason:
            break
    return [*found, of.take_rest()]


def tokens(kind: str, min_size: int = 0) -> st.SearchStrategy[list[int]]:
    ids = range(tokenizer(kind).vocab_size)
    return st.lists(st.sampled_from(ids), min_size=min_size, max_size=12)


def choice(kind: str, prompt: list[int], answer: list[int], *top: tuple[int, float]) -> Any:
    """A completion with log-probabilities, as a client gets it."""
    generated = output(kind, prompt)
    pieces(generated, answer)
    given = [TokenLogprob(token, -1.0, top) for token in generated.token_ids]
    body = replies.body(
        parse({"prompt": prompt, "logprobs": 5}),
        [Generation(1, FinishReason.STOP, generated.token_ids, generated.text, given)],
        job_id="1",
        model="m",
        created=0,
        tokenizer=tokenizer(kind),
        prompts=[prompt],
    )
    return body["choices"][0]


# ── texts ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
@few
@given(data=st.data())
def test_streamed_pieces_add_up_to_the_bytes_of_the_tokens(kind: str, data: st.DataObject) -> None:
    prompt, answer = data.draw(tokens(kind)), data.draw(tokens(kind))
    plain, streamed = output(kind, prompt), output(kind, prompt, stream=True)

    told = "".join(pieces(streamed, answer))
    pieces(plain, answer)

    assert told == streamed.text == plain.text
    scored = replies.logprobs.Spelling(tokenizer(kind), prompt)
    drawn = [TokenLogprob(each, 0.0) for each in plain.token_ids]
    in_order = scored.in_order(drawn, scored.first)
    joined = b"".join(scored.bytes_of(each.token_id, before) for each, before in in_order)
    assert joined.decode(errors="replace") == plain.text


@pytest.mark.parametrize("kind", KINDS)
@few
@given(data=st.data())
def test_a_prompt_and_its_answer_read_as_if_they_were_one_text(
    kind: str, data: st.DataObject
) -> None:
    # given a prompt that has some text, and any end
    prompt = data.draw(tokens(kind, min_size=1))
    answer = [each for each in data.draw(tokens(kind)) if each != EOS]
    generated = output(kind, prompt)

    # when
    pieces(generated, answer)

    # then
    decode = library(kind).decode
    whole = decode(prompt + answer)
    if set(prompt) - tokenizer(kind).special.keys() and "\ufffd" not in whole + decode(prompt):
        assert decode(prompt) + generated.text == whole


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["the mill grinds grain", "naïve 漢字 🙂 stop", "yes no maybe"])
def test_an_answer_of_an_encoder_decoder_begins_as_a_text_does(kind: str, text: str) -> None:
    encoder_decoder = tokenizer(kind, encoder_decoder=True)
    answer = encoder_decoder._file.encode(text).ids

    generated = Output(SamplingParams(99), encoder_decoder, [BOS, 9, EOS])
    pieces(generated, answer)

    assert generated.text == encoder_decoder._file.decode(answer)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(data=st.data(), stop=st.lists(st.text(" them", min_size=1, max_size=3), min_size=1))
def test_a_stop_string_is_found_wherever_it_begins(
    kind: str, data: st.DataObject, stop: list[str]
) -> None:
    prompt, answer = data.draw(tokens(kind)), data.draw(tokens(kind))
    plain = output(kind, prompt)
    pieces(plain, answer)

    stopped = output(kind, prompt, stop=tuple(stop))
    pieces(stopped, answer)

    behind = plain.text.removeprefix(stopped.text)
    assert stopped.text + behind == plain.text
    assert not any(each in stopped.text for each in stop)
    assert behind.startswith(tuple(stop)) or behind == ""


def test_a_stop_string_that_begins_with_the_answers_first_blank_is_found() -> None:
    prompt = library("llama").encode("the wheel").ids
    answer = library("llama").encode("the mill").ids

    stopped = output("llama", prompt, stop=(" the",))

    assert library("llama").id_to_token(answer[0]).startswith("▁the")
    assert pieces(stopped, answer) == ["", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_string_that_is_a_special_token_stops(kind: str) -> None:
    for stop in (("<|end|>",), ("zz", "</s>")):
        found = output(kind, [BOS, 9], stop=stop, ignore_eos=True)
        end = library(kind).token_to_id(stop[-1])

        assert [found.append(9), found.append(end)] == [None, FinishReason.STOP]
        assert found.token_ids == [9, end]
        assert stop[-1] not in found.text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [" mill", "mill", " the wheel", "漢é", " "])
def test_a_stretch_of_a_text_has_the_tokens_that_write_it_there(kind: str, text: str) -> None:
    within = tokenizer(kind).encode_within(text)

    found = output(kind, library(kind).encode("the stone").ids)
    pieces(found, [*within])
    assert found.text == (text if within else "")
    assert within or kind not in COMPLETE


def test_a_word_behind_a_blank_is_the_token_that_a_model_would_draw() -> None:
    of = tokenizer("llama")

    behind_a_blank, going_on = of.encode_within(" mill"), of.encode_within("mill")

    assert list(map(library("llama").id_to_token, behind_a_blank)) == ["▁mill"]
    assert "▁" not in "".join(map(library("llama").id_to_token, going_on))


# ── log-probabilities ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
@few
@given(data=st.data())
def test_each_token_begins_where_its_offset_says(kind: str, data: st.DataObject) -> None:
    prompt, answer = data.draw(tokens(kind, min_size=1)), data.draw(tokens(kind))

    found = choice(kind, prompt, answer)

    text, names, offsets = found["text"], *map(found["logprobs"].get, ("tokens", "text_offset"))
    assert offsets == sorted(offsets) and all(0 <= each <= len(text) for each in offsets)
    for name, offset, token in zip(names, offsets, answer, strict=False):
        if token not in tokenizer(kind).special and not name.startswith("bytes:"):
            assert text[offset:].startswith(name)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(data=st.data())
def test_no_two_likely_tokens_fall_into_one_key(kind: str, data: st.DataObject) -> None:
    ids = range(tokenizer(kind).vocab_size + 3)
    top = data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=20, unique=True))
    came = data.draw(st.sampled_from(ids))
    prompt = data.draw(tokens(kind, min_size=1))

    found = choice(kind, prompt, [came], *((each, -float(i)) for i, each in enumerate(top)))

    [likely] = found["logprobs"]["top_logprobs"]
    assert len(likely) == len({*top, came})
    assert [*likely.values()][: len(top)] == [-float(i) for i in range(len(top))]
    json.dumps(found).encode()
    assert "\\u0000" not in json.dumps(found)


def test_the_bytes_of_a_part_of_a_character_are_its_own() -> None:
    for kind in ("byte_level", "llama"):
        ids = [each for letter in "é🙂" for each in by_bytes(kind, letter)]
        scores = [TokenLogprob(each, -1.0, ((each, -1.0),)) for each in ids]

        found = replies.logprobs.of_chat(scores, replies.logprobs.Spelling(tokenizer(kind), [9]))[
            "content"
        ]

        assert bytes(byte for each in found for byte in each["bytes"]).decode() == "é🙂"
        assert [each["token"] for each in found] == [rf"\x{it:02x}" for it in "é🙂".encode()]
        assert found[0]["top_logprobs"][0]["bytes"] == [0xC3]
        assert choice(kind, [9], ids)["logprobs"]["text_offset"] == [0, 0, 1, 1, 1, 1]


def test_what_is_no_character_takes_the_places_that_it_has_in_the_text() -> None:
    # the first two could only begin a surrogate, and are told to be wrong by what follows
    broken = [0xED, 0xA0, ord("a"), 0xE2, 0x82, ord("b")]

    found = replies.logprobs._offsets([bytes([each]) for each in broken])

    text = bytes(broken).decode(errors="replace")
    offsets = list(found)
    assert [text[offsets[at]] for at in (2, 5)] == ["a", "b"]
    assert offsets == sorted(offsets)


def by_bytes(kind: str, text: str) -> list[int]:
    alone = {tokenizer(kind).token_bytes(each, 9): each for each in range(4, 300)}
    return [alone[bytes([byte])] for byte in text.encode()]


def test_a_special_token_has_a_name_and_no_bytes() -> None:
    [found] = replies.logprobs.of_chat(
        [TokenLogprob(EOS, -1.0)], replies.logprobs.Spelling(tokenizer("llama"), [9])
    )["content"]

    assert (found["token"], found["bytes"]) == ("</s>", None)


# ── grammars ────────────────────────────────────────────────────────────────────────────────────

REGEXES = [
    "(yes|no|maybe)",
    "[a-z ]{3,9}",
    r"\d{4}-\d\d-\d\d",
    " ?the (mill|wheel)s? ",
    "(漢|é|🙂)+",
]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"enum": [17, "no", None]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA))


@functools.cache
def grammars(kind: str, encoder_decoder: bool = False) -> Grammars:
    return Grammars(tokenizer(kind, encoder_decoder=encoder_decoder))


def walk(kind: str, grammar: Grammar, seed: int, *, encoder_decoder: bool = False) -> Output:
    """An output of tokens that the grammar allows, each as likely as any other."""
    draw, of = random.Random(seed), tokenizer(kind, encoder_decoder=encoder_decoder)
    found = Output(SamplingParams(300, grammar=grammar), of, [BOS])
    found.matcher = grammars(kind, encoder_decoder).compile(grammar).wait()
    mask = np.zeros(-(-of.vocab_size // 32), np.int32)
    reason = None
    while reason is None:
        found.matcher.fill(mask)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        reason = found.append(int(draw.choice(np.flatnonzero(bits))))
    if found.error:
        raise InvalidSchema(found.error[1])
    return found


@pytest.mark.parametrize("encoder_decoder", [False, True], ids=["decoder", "encoder-decoder"])
@pytest.mark.parametrize("kind", WITH_GRAMMAR)
def test_an_answer_matches_its_own_grammar(kind: str, encoder_decoder: bool) -> None:
    matched, refused = set(), set()
    for seed, pattern in itertools.product(range(6), REGEXES):
        try:
            held = walk(kind, Grammar("regex", pattern), seed, encoder_decoder=encoder_decoder)
        except InvalidSchema:
            refused.add(pattern)
            continue
        assert re.fullmatch(pattern, held.text), (pattern, held.text)
        matched.add(pattern)
    assert matched
    if kind in COMPLETE:  # the others lack characters, or words that begin where no blank is
        assert not refused
        held = walk(kind, JSON, 1, encoder_decoder=encoder_decoder)
        jsonschema.validate(json.loads(held.text), SCHEMA)


def test_a_tokenizer_whose_tokens_have_no_bytes_of_their_own_is_held_to_no_grammar() -> None:
    with pytest.raises(InvalidSchema, match="tokenizer cannot be held"):
        walk("word_ends", Grammar("regex", "yes"), 0)
