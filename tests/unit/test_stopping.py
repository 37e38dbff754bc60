"""Stop strings are found wherever token borders fall."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.config.settings import ModelSettings
from app.engines.text.stopping import Output
from app.engines.text.tokenizer import StubTokenizer
from app.jobs import FinishReason, Kind, SamplingParams

SETTINGS = ModelSettings(source="stub", kind=Kind.GENERATE, engine="stub")
BYTES = StubTokenizer(SETTINGS)  #: one token a byte, as a byte-level tokenizer at its worst
EOS = BYTES.EOS


def decode(token_ids: Sequence[int]) -> str:
    return bytes(token for token in token_ids if token < EOS).decode(errors="replace")


def output(*stop: str, max_tokens: int = 1000, **params: Any) -> Output:
    return Output(SamplingParams(max_tokens, stop=stop, **params), BYTES, ())


class Words(StubTokenizer):
    """One token for each of these texts; what is in angle brackets is special."""

    def __init__(self, *words: str | bytes) -> None:
        super().__init__(SETTINGS)
        self._words = [word.encode() if isinstance(word, str) else word for word in words]
        shown = enumerate(each.decode(errors="replace") for each in self._words)
        self.special = {i: word for i, word in shown if word[0] + word[-1] == "<>"}
        self.eos_token_ids = frozenset()

    def token_bytes(self, token_id: int, before: int | None) -> bytes:
        return b"" if token_id in self.special else self._words[token_id]


def feed(into: Output, token_ids: Sequence[int]) -> FinishReason | None:
    return next((reason for token in token_ids if (reason := into.append(token))), None)


def test_a_stop_string_over_several_tokens_ends_the_text_before_it() -> None:
    found = output("\n\n")

    reason = feed(found, b"one\n\ntwo")

    assert reason is FinishReason.STOP
    assert found.text == "one"
    assert bytes(found.token_ids) == b"one\n\n"


def test_the_stop_string_that_begins_first_decides() -> None:
    found = output("cd", "bcde", "d")

    feed(found, b"abcdef")

    assert found.text == "ab"


def test_a_character_split_over_tokens_is_matched_whole() -> None:
    found = output("🙂")

    reason = feed(found, "naïve 漢字 🙂 end".encode())

    assert reason is FinishReason.STOP
    assert found.text == "naïve 漢字 "


def test_half_a_character_does_not_hide_a_stop_string_before_it() -> None:
    found = Output(SamplingParams(max_tokens=1, stop=("END",)), Words(b"x END\xe2"), ())

    assert found.append(0) is FinishReason.STOP
    assert found.text == "x "


def test_the_end_token_ends_the_sequence_and_is_counted() -> None:
    found = output()

    assert feed(found, [*b"ab", EOS, *b"cd"]) is FinishReason.STOP
    assert found.text == "ab"
    assert len(found.token_ids) == 3


def test_the_end_token_is_one_of_many_when_told_to_ignore_it() -> None:
    found = output(ignore_eos=True, max_tokens=5)

    assert feed(found, [*b"ab", EOS, *b"cd"]) is FinishReason.LENGTH
    assert found.text == "abcd"


def test_the_length_ends_what_nothing_else_does() -> None:
    found = output("zzz", max_tokens=3)

    assert feed(found, b"abcdef") is FinishReason.LENGTH
    assert found.text == "abc"


@given(st.text(max_size=60), st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=4))
def test_the_text_is_what_a_search_of_the_whole_would_give(text: str, stops: list[str]) -> None:
    text = text.replace("\ufffd", "")
    stops = [stop for stop in stops if "\ufffd" not in stop] or ["x"]
    found = output(*stops)

    reason = feed(found, text.encode())

    # The sequence ends with the first token that completes a stop string.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    seen = text[: min(ends)] if ends else text
    begins = min((seen.find(stop) for stop in stops if stop in seen), default=None)
    assert found.text == seen[:begins]
    assert (reason is FinishReason.STOP) == bool(ends)


@given(st.binary(max_size=60))
def test_text_that_is_never_valid_is_kept_as_it_decodes(noise: bytes) -> None:
    found = output("\x00\x01\x02\x03")

    if feed(found, noise) is None:
        assert found.text == decode(noise)


@pytest.mark.parametrize("stop", ["ab", "b c", "c"])
def test_tokens_of_several_characters_match_inside_and_across(stop: str) -> None:
    words = Words("a", "b", " ", "c", "ab c", "b ")
    found = Output(SamplingParams(100, stop=(stop,)), words, ())

    feed(found, [0, 1, 2, 3])

    assert found.text == "ab c"[: "ab c".find(stop)]


# ── special tokens ──────────────────────────────────────────────────────────────────────────────

TURNS = Words("<end>", "<turn>", "mill", " ", "ed", "en")


def turns(*stop: str, **params: Any) -> Output:
    return Output(SamplingParams(100, stop=stop, **params), TURNS, (), stream=True)


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<end>", "mill "),
        (" <end>", "mill"),
        ("<end>mill", "mill "),
        ("> <", "mill mill mill"),  # a part of their texts is nothing
        ("mill mill", ""),  # to a stop string that names none of them they are not there
    ],
)
def test_a_stop_string_finds_the_special_tokens_that_it_names(stop: str, text: str) -> None:
    found = turns(stop)

    feed(found, [2, 3, 0, 2, 3, 1, 2])

    assert found.text == text


def test_a_special_token_that_is_found_by_no_stop_string_is_not_in_the_text() -> None:
    found = turns("<end><turn>")

    reason = feed(found, [2, 0, 3, 0, 2])

    assert (reason, found.text) == (None, "mill mill")


@given(
    st.lists(st.integers(0, 5), max_size=12), st.lists(st.text("<>endmil ", min_size=1), max_size=3)
)
def test_pieces_add_up_to_the_text_whatever_special_tokens_are_named(
    token_ids: list[int], stop: list[str]
) -> None:
    found = turns(*stop, "<end>m")

    pieces = []
    for token in token_ids:
        reason = found.append(token)
        pieces.append(found.take_text())
        if reason:
            break
    pieces.append(found.take_rest())

    assert "".join(pieces) == found.text


# ── other ends ──────────────────────────────────────────────────────────────────────────────────


def test_a_token_that_is_to_end_the_output_is_not_in_its_text() -> None:
    found = output(stop_token_ids=(ord("c"),), ignore_eos=True)

    assert feed(found, b"abcd") is FinishReason.STOP
    assert (found.text, bytes(found.token_ids)) == ("ab", b"abc")


def test_an_end_that_is_not_marked_special_is_not_in_the_text() -> None:
    words = Words("mill", "</s")
    words.eos_token_ids = frozenset({1})
    found = Output(SamplingParams(9), words, ())

    assert feed(found, [0, 1, 0]) is FinishReason.STOP
    assert found.text == "mill"


def test_nothing_but_the_length_ends_an_output_before_it_has_its_least_tokens() -> None:
    found = output("b", "ef", min_tokens=5, stop_token_ids=(ord("a"),))

    reason = feed(found, [*b"a", EOS, *b"bde", *b"fgh"])

    assert (reason, found.text) == (FinishReason.STOP, "abd")
    assert feed(output("a", min_tokens=9, max_tokens=3), b"aaaa") is FinishReason.LENGTH
