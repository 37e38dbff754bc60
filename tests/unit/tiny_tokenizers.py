"""Small tokenizers of every kind that models come with, made as transformers makes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer as TokenizerFile
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from app.config.settings import ModelSettings
from app.engines.text.tokenizer import FileTokenizer

SETTINGS: Final = ModelSettings(source="x", kind="generate", engine="generate")
SPECIAL: Final = ["<unk>", "<s>", "</s>", "<|end|>"]
UNK, BOS, EOS, END = range(4)
BYTES: Final = [f"<0x{byte:02X}>" for byte in range(256)]
_LETTERS: Final = [chr(code) for code in range(33, 127)]
_CORPUS: Final = [
    "the mill grinds grain, and the miller's wheel turns in the water",
    "a wheel of stone grinds the grain to flour: naïve 漢字 🙂 don't stop",
    '{"name": "mill", "age": 17, "stones": [1, 2, 3], "runs": true}',
    "0123456789 yes no maybe 2024-05-06 The End.",
] * 3


def byte_level() -> TokenizerFile:
    """GPT-2, Llama 3, Qwen, SmolLM2."""
    file = TokenizerFile(models.BPE())
    file.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    file.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return _trained(file, trainers.BpeTrainer, vocab_size=420, initial_alphabet=alphabet)


def llama() -> TokenizerFile:
    """SentencePiece's BPE: a blank before each text, and bytes for unknown characters."""
    sequence = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    return _byte_fallback(normalizers.Sequence(sequence), decoders.Strip(content=" ", left=1))


def gemma() -> TokenizerFile:
    """The same without that blank."""
    return _byte_fallback(normalizers.Replace(" ", "▁"))


def unigram() -> TokenizerFile:
    """T5, NLLB, mBART."""
    file = TokenizerFile(models.Unigram())
    file.normalizer = normalizers.NFKC()
    file.pre_tokenizer = pre_tokenizers.Metaspace()
    file.decoder = decoders.Metaspace()
    return _trained(
        file,
        trainers.UnigramTrainer,
        vocab_size=160,
        unk_token="<unk>",
        initial_alphabet=[*_LETTERS, "▁"],
    )


def word_piece() -> TokenizerFile:
    """BERT, and decoders that took its tokenizer."""
    file = TokenizerFile(models.WordPiece(unk_token="<unk>"))
    file.normalizer = normalizers.BertNormalizer(lowercase=False)
    file.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    file.decoder = decoders.WordPiece(prefix="##")
    letters = [*_LETTERS, *"ï漢字🙂"]
    return _trained(file, trainers.WordPieceTrainer, vocab_size=300, initial_alphabet=letters)


def word_ends() -> TokenizerFile:
    """The first GPT: a mark where a word ends, which is a blank if another follows."""
    file = TokenizerFile(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    file.normalizer = normalizers.BertNormalizer(lowercase=False)
    file.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    file.decoder = decoders.BPEDecoder("</w>")
    return _trained(file, trainers.BpeTrainer, vocab_size=300, end_of_word_suffix="</w>")


def characters() -> TokenizerFile:
    letters = sorted({*"".join(_CORPUS), *_LETTERS, "\n"})
    vocab = {token: place for place, token in enumerate([*SPECIAL, *letters])}
    file = TokenizerFile(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    file.decoder = decoders.Fuse()
    return _with_special(file)


def plain_words() -> TokenizerFile:
    """No decoder: the library puts a blank between two tokens."""
    words = sorted({*" ".join(_CORPUS).split(), "yes", "no"})
    vocab = {token: place for place, token in enumerate([*SPECIAL, *words])}
    file = TokenizerFile(models.WordLevel(vocab, unk_token="<unk>"))
    file.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _with_special(file)


KINDS: Final[dict[str, Callable[[], TokenizerFile]]] = {
    make.__name__: make
    for make in (
        byte_level,
        llama,
        gemma,
        unigram,
        word_piece,
        word_ends,
        characters,
        plain_words,
    )
}


def save(file: TokenizerFile, folder: Path, config: dict[str, Any] | None = None) -> Path:
    """The files that a tokenizer is loaded from, `config` with more keys of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    file.save(str(folder / "tokenizer.json"))
    texts = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(texts))
    given = {"max_position_embeddings": 5_000} | (config or {})
    (folder / "config.json").write_text(json.dumps(given))
    return folder


def load(file: TokenizerFile, folder: Path, config: dict[str, Any] | None = None) -> FileTokenizer:
    return FileTokenizer(save(file, folder, config), SETTINGS)


def _byte_fallback(normalizer: Any, *ends: Any) -> TokenizerFile:
    file = TokenizerFile(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    file.normalizer = normalizer
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    file.decoder = decoders.Sequence(parts)
    file.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    letters = [*_LETTERS, "▁"]
    trained = _trained(
        file,
        trainers.BpeTrainer,
        vocab_size=500,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        special_tokens=[*SPECIAL, *BYTES],
    )
    # The trainer makes special tokens of the bytes, which are only to have a place of their own.
    state = json.loads(trained.to_str())
    state["added_tokens"] = [it for it in state["added_tokens"] if it["content"] not in BYTES]
    state["pre_tokenizer"] = None
    return TokenizerFile.from_str(json.dumps(state))


def _trained(file: TokenizerFile, trainer: Any, **given: Any) -> TokenizerFile:
    given = {"special_tokens": SPECIAL, "show_progress": False} | given
    file.train_from_iterator(_CORPUS, trainer(**given))
    return _with_special(file)


def _with_special(file: TokenizerFile) -> TokenizerFile:
    file.add_special_tokens(SPECIAL)
    file.add_tokens(["<think>", "  "])
    return file
