"""Stop strings are found wherever token borders fall."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.engines.stopping import Output
from app.jobs import FinishReason, SamplingParams

EOS = 256


def decode(token_ids: Sequence[int]) -> str:
    """One token a byte, as a byte-level tokenizer does at its worst."""
    return bytes(token for token in token_ids if token < EOS).decode(errors="replace")


def output(*stop: str, max_tokens: int = 1000, ignore_eos: bool = False) -> Output:
    params = SamplingParams(max_tokens, stop=stop, ignore_eos=ignore_eos)
    return Output(params, decode, {EOS})


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
    found = Output(
        SamplingParams(max_tokens=1, stop=("END",)), lambda ids: "x END\ufffd" if ids else "", ()
    )

    assert found.append(7) is FinishReason.STOP
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
    words = ["a", "b", " ", "c", "ab c", "b "]
    tokens = [0, 1, 2, 3]
    found = Output(
        SamplingParams(100, stop=(stop,)), lambda ids: "".join(words[token] for token in ids), ()
    )

    feed(found, tokens)

    assert found.text == "ab c"[: "ab c".find(stop)]
