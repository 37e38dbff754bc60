"""Tokenizers of Marian and M2M100: SentencePiece finds the pieces, vocab.json has their ids.

Their folders have no tokenizer.json, and none can be written of them: a piece may have no id, and
an id no piece of the source's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from app.config.settings import ModelSettings
from app.engines.checkpoint.json_files import read_json
from app.engines.text.tokenizer import FileTokenizer, Tokenizer
from app.engines.text.tokenizer_file import pieces_file
from app.errors import ConfigError


class PieceTokenizer(FileTokenizer):
    """A FileTokenizer of the ids; what a text is split into is the library's matter."""

    def __init__(self, folder: Path, settings: ModelSettings) -> None:
        super().__init__(folder, settings)
        self.drops_blank = self._pieces.drops_blank = True
        self._library = _library(folder)
        self._ids: dict[str, int] = read_json(folder / "vocab.json")
        self._unknown = self._ids[self._special_texts.get("unk_token", "<unk>")]
        self._eos = self._ids[self._special_texts.get("eos_token", "</s>")]
        self._codes = {text: token_id for token_id, text in self.special.items()}
        self._codes |= {text: it for text, it in self._ids.items() if re.fullmatch(r">>.+<<", text)}
        longest_first = sorted(self._codes, key=len, reverse=True)
        self._code = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    def encode_text(self, text: str, *, parse_special: bool = False) -> tuple[int, ...]:
        return (*self.encode_bare(text, parse_special=parse_special), self._eos)

    def encode_bare(self, text: str, *, parse_special: bool = False) -> tuple[int, ...]:
        if not parse_special:
            return self._split(text)
        ids: list[int] = []
        for place, part in enumerate(self._code.split(text)):
            ids += [self._codes[part]] if place % 2 else self._split(part)
        return tuple(ids)

    encode = Tokenizer.encode

    def _split(self, text: str) -> tuple[int, ...]:
        pieces = self._library.encode(text, out_type=str)
        return tuple(self._ids.get(piece, self._unknown) for piece in pieces)


def _library(folder: Path) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ConfigError(
            "The tokenizer needs the package sentencepiece; run `pip install sentencepiece`."
        ) from None
    file = pieces_file(folder)
    try:
        return SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}.") from None


def file_tokenizer(folder: Path, settings: ModelSettings) -> Tokenizer:
    """By the files that the folder has."""
    if (folder / "tokenizer.json").is_file() or pieces_file(folder) is None:
        return FileTokenizer(folder, settings)
    return PieceTokenizer(folder, settings)
