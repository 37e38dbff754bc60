"""Log-probabilities of an answer's tokens in the shapes of OpenAI's API. Pure."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from app.engines.base import TokenLogprob, finite
from app.engines.text.detokenizer import Detokenizer, last_token
from app.engines.text.tokenizer import Tokenizer

_UTF8: Final = codecs.getincrementaldecoder("utf-8")


def of_chat(scored: Sequence[TokenLogprob], spelling: Spelling) -> dict[str, Any]:
    """`logprobs` of a choice of a chat completion."""
    return _of_chat(scored, spelling, spelling.first)


def _of_chat(
    scored: Sequence[TokenLogprob], spelling: Spelling, before: int | None
) -> dict[str, Any]:
    content = [
        {
            **_entry(each.token_id, each.logprob, spelling, before),
            "top_logprobs": [_entry(*top, spelling, before) for top in each.top],
        }
        for each, before in spelling.in_order(scored, before)
    ]
    return {"content": content, "refusal": None}


def of_completion(scored: Sequence[TokenLogprob], spelling: Spelling, text: str) -> dict[str, Any]:
    """`logprobs` of a choice of a completion, whose text may end before the last token does."""
    places = list(spelling.in_order(scored, spelling.first))
    return _of_places(places, spelling, len(text))


def _of_places(
    places: Sequence[tuple[TokenLogprob, int | None]], spelling: Spelling, most: int
) -> dict[str, Any]:
    offsets = _offsets([spelling.bytes_of(each.token_id, before) for each, before in places])
    return {
        "tokens": [spelling.name(each.token_id, before, "bytes:") for each, before in places],
        "token_logprobs": [finite(each.logprob) for each, _ in places],
        "top_logprobs": [_by_name(each, spelling, before) for each, before in places],
        "text_offset": [min(offset, most) for offset in offsets],
    }


def behind(
    scored: Sequence[TokenLogprob], spelling: Spelling, prompt: str, answer: dict[str, Any]
) -> dict[str, Any]:
    """The same with those of the prompt before them; nothing makes its first token likely."""
    first = TokenLogprob(spelling.prompt_token_ids[0], 0.0)
    told = of_completion([first, *scored], Spelling(spelling.tokenizer, ()), prompt)
    told["token_logprobs"][0] = told["top_logprobs"][0] = None
    offsets = [len(prompt) + offset for offset in answer["text_offset"]]
    return {name: told[name] + each for name, each in (answer | {"text_offset": offsets}).items()}


class Running:
    """Those of an answer whose tokens come a few at a time."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling
        self._before = spelling.first
        self._text = Detokenizer(spelling.tokenizer, spelling.prompt_token_ids)
        self._length = 0  #: of the text so far, in characters

    def of_chat(self, scored: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
        """Entries of `content`."""
        told: list[dict[str, Any]] = _of_chat(scored, self._spelling, self._before)["content"]
        self._go_on(scored)
        return told

    def of_completion(self, scored: Sequence[TokenLogprob]) -> dict[str, Any]:
        places = list(self._spelling.in_order(scored, self._before))
        told = _of_places(places, self._spelling, sys.maxsize)
        told["text_offset"] = [self._length + offset for offset in told["text_offset"]]
        self._length += sum(len(self._text.read(each.token_id)) for each in scored)
        self._go_on(scored)
        return told

    def _go_on(self, scored: Sequence[TokenLogprob]) -> None:
        for each, before in self._spelling.in_order(scored, self._before):
            has_text = self._spelling.bytes_of(each.token_id, before)
            self._before = each.token_id if has_text else before


@dataclass(frozen=True, slots=True)
class Spelling:
    """How the tokens of an answer are written."""

    tokenizer: Tokenizer
    prompt_token_ids: Sequence[int]

    @property
    def prompt_text(self) -> str:
        text = Detokenizer(self.tokenizer, ())
        return "".join(map(text.read, self.prompt_token_ids)) + text.rest

    @property
    def first(self) -> int | None:
        """What the first token's text follows."""
        return last_token(self.tokenizer, self.prompt_token_ids)

    def in_order(
        self, scored: Sequence[TokenLogprob], before: int | None
    ) -> Iterator[tuple[TokenLogprob, int | None]]:
        """Each token with the one whose text it follows; `before` is that of the first."""
        for each in scored:
            yield each, before
            before = each.token_id if self.bytes_of(each.token_id, before) else before

    def bytes_of(self, token_id: int, before: int | None) -> bytes:
        return self.tokenizer.token_bytes(token_id, before)

    def name(self, token_id: int, before: int | None, prefix: str = "") -> str:
        r"""A special token as it is written, any other as its text; what is no text by itself, or
        cannot be stored, as OpenAI writes it: `\xe2\x82`, with a prefix."""
        if (special := self.tokenizer.special.get(token_id)) is not None:
            return special
        piece = self.bytes_of(token_id, before)
        try:
            text = piece.decode()
        except UnicodeDecodeError:
            text = "\0"
        if "\0" not in text:
            return text
        return prefix + "".join(f"\\x{byte:02x}" for byte in piece)


def _entry(token_id: int, logprob: float, spelling: Spelling, before: int | None) -> dict[str, Any]:
    special = token_id in spelling.tokenizer.special
    return {
        "token": spelling.name(token_id, before),
        "bytes": None if special else [*spelling.bytes_of(token_id, before)],
        "logprob": finite(logprob),
    }


def _by_name(each: TokenLogprob, spelling: Spelling, before: int | None) -> dict[str, float]:
    """The likeliest tokens, and the one that came. Of tokens that look the same the likelier has
    the name, and the others their ids."""
    found: dict[str, float] = {}
    ids = [token_id for token_id, _ in each.top]
    came = [] if not ids or each.token_id in ids else [(each.token_id, each.logprob)]
    for token_id, logprob in (*each.top, *came):
        name = spelling.name(token_id, before, "bytes:")
        found[f"token_id:{token_id}" if name in found else name] = finite(logprob)
    return found


def _offsets(pieces: Sequence[bytes]) -> Iterator[int]:
    """Where in the text each begins, in characters; within a character, where that begins."""
    utf8, length = _UTF8(errors="replace"), 0
    for piece in pieces:
        pending, _ = utf8.getstate()
        is_broken = pending and piece and not _goes_on(pending, piece)
        yield length + (len(pending.decode(errors="replace")) if is_broken else 0)
        length += len(utf8.decode(piece))


def _goes_on(pending: bytes, piece: bytes) -> bool:
    """Whether a character that has begun is not broken off."""
    try:
        _UTF8().decode(pending + piece[:1])
    except UnicodeDecodeError:
        return False
    return True
