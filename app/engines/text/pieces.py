"""What each token adds to a text, in bytes.

A text is the bytes of its tokens put together. A library decodes token ids as a whole instead, by
rules that look at the first one and at what is next to each other, so that an answer loses the
blank it begins with, and half a character changes what was there before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

from tokenizers import Tokenizer as TokenizerFile

_CONTEXT_FREE: Final = frozenset(
    {"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Sequence", "Strip", "WordPiece"}
)
"""Decoders for which a token within a text is always the same text."""

_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")
"""How vocabularies with a byte fallback write a byte."""


class Pieces:
    """The bytes of the tokens of a tokenizer.json. Safe to use from several threads."""

    def __init__(self, file: TokenizerFile) -> None:
        decoders = set(_types(_state(file.decoder)))
        self.are_context_free = decoders <= _CONTEXT_FREE
        self._file = file
        self._is_byte_level = "ByteLevel" in decoders
        self._has_bytes = "ByteFallback" in decoders
        self._added = file.get_added_tokens_decoder()
        self._within: dict[int, bytes] = {}  #: of tokens that were asked for, behind any other
        self._any = self._readable()
        begun = self._file.encode("a", add_special_tokens=False).ids
        own = b"".join(self.find(each, self._any) for each in begun)
        self.drops_blank = own == b" a" and self._text(*begun) == "a"
        """Whether the vocabulary begins a text with a blank that is not the text's."""

    def of(self, token_id: int, before: int | None) -> bytes:
        """Of a token behind `before`, or at the beginning of a text."""
        if before is None or not self.are_context_free:
            return self.find(token_id, before)
        piece = self._within.get(token_id)
        if piece is None:
            piece = self._within[token_id] = self.find(token_id, self._any)
        return piece

    def find(self, token_id: int, before: int | None) -> bytes:
        """The same without a memory."""
        if before is None:
            piece = self.find(token_id, self._any)
            return piece[1:] if self.drops_blank and piece.startswith(b" ") else piece
        token = self._file.id_to_token(token_id) or ""
        if self._is_byte_level:
            if token_id not in self._added and all(letter in _BYTES for letter in token):
                return bytes(_BYTES[letter] for letter in token)
            return token.encode()
        if self._has_bytes and (byte := _BYTE.fullmatch(token)):
            return bytes.fromhex(byte[1])
        return self._text(before, token_id)[len(self._text(before)) :].encode()

    def _text(self, *token_ids: int) -> str:
        return self._file.decode(list(token_ids), skip_special_tokens=False)

    def _readable(self) -> int:
        """A token that is text by itself, behind which others can be looked at."""
        ids = range(self._file.get_vocab_size())
        plain = (each for each in ids if each not in self._added)
        return next((each for each in plain if self._text(each).isalnum()), 0)


def _state(decoder: Any) -> Any:
    """As it is in the file: the library shows it no other way but all with the vocabulary."""
    return None if decoder is None else json.loads(decoder.__getstate__())


def _types(state: Any) -> Iterator[str]:
    """Names of a decoder and of those that it is made of."""
    if state is not None:
        yield state["type"]
        for part in state.get("decoders", ()):
            yield from _types(part)


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies, as GPT-2 came with: itself
    where it can be seen, else one from U+0100 on."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("ÿ") + 1)} - {ord("\xad")}
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


_BYTES: Final = _byte_letters()
