"""A model's tokenizer.json, with what the files beside it add, as transformers loads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as TokenizerFile

from app.engines.checkpoint.json_files import read_json
from app.errors import ConfigError

_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")


def load(folder: Path) -> tuple[TokenizerFile, dict[str, str]]:
    """The tokenizer, and the texts of special tokens by name, as `eos_token`."""
    file = _read(folder)
    file.no_truncation()  # what a training run wrote into the file is not for us
    file.no_padding()
    config = read_json(folder / "tokenizer_config.json")
    mapped = read_json(folder / "special_tokens_map.json") | config
    named = _named(mapped)
    _add(file, config.get("added_tokens_decoder") or {})
    if pieces_file(folder) is not None:
        _add_languages(file, mapped)
    _mark(file, named.values())
    return file, named


def _read(folder: Path) -> TokenizerFile:
    path = folder / "tokenizer.json"
    try:
        if not path.is_file() and pieces_file(folder):
            return _of_pieces(folder)
        return TokenizerFile.from_file(str(path))
    except ConfigError:
        raise
    except Exception as error:  # the library raises nothing more precise
        raise ConfigError(f"{path} cannot be read: {error}.") from None


def pieces_file(folder: Path) -> Path | None:
    """The SentencePiece model whose pieces get their ids from vocab.json, if the folder has such:
    Marian's, or M2M100's."""
    if not (folder / "vocab.json").is_file():
        return None
    files = (folder / "source.spm", folder / "sentencepiece.bpe.model")
    return next((file for file in files if file.is_file()), None)


def _of_pieces(folder: Path) -> TokenizerFile:
    """What the ids of an output are. It splits no texts."""
    target = folder / "target_vocab.json"  # of a Marian with a vocabulary for each side
    vocab = read_json(target if target.is_file() else folder / "vocab.json")
    file = TokenizerFile(models.WordLevel(vocab, unk_token="<unk>"))  # noqa: S106
    file.decoder = decoders.Metaspace()
    return file


def _add_languages(file: TokenizerFile, config: Mapping[str, Any]) -> None:
    """M2M100's have the ids behind the vocabulary, in the order of this list."""
    listed = config.get("additional_special_tokens") or config.get("extra_special_tokens") or ()
    texts = [it.get("content", "") if isinstance(it, dict) else str(it) for it in listed]
    file.add_special_tokens([AddedToken(it, normalized=False) for it in texts])


def _named(config: Mapping[str, Any]) -> dict[str, str]:
    """Beside texts there are settings of such names, as `add_bos_token`."""
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token")
    }
    return {name: text for name, text in texts.items() if isinstance(text, str) and text}


def _mark(file: TokenizerFile, texts: Iterable[str]) -> None:
    """Let tokens of these texts be found in any text. A single letter, as the "!" that some models
    pad with, is a letter all the same."""
    added = {token.content for token in file.get_added_tokens_decoder().values()}
    known = (it for it in texts if len(it) > 1 and file.token_to_id(it) is not None)
    file.add_special_tokens([AddedToken(it, normalized=False) for it in known if it not in added])


def _add(file: TokenizerFile, listed: Mapping[str, Mapping[str, Any]]) -> None:
    """Tokens with the ids that they have in the vocabulary, or get right behind it."""
    size = file.get_vocab_size()
    tokens = []
    for token_id, given in sorted((int(key), value) for key, value in listed.items()):
        known = file.token_to_id(given["content"])
        if known is None and token_id == size:
            known, size = token_id, size + 1
        if known == token_id:
            flags = {name: given[name] for name in _FLAGS if name in given}
            tokens.append(AddedToken(given["content"], **flags))
    file.add_tokens(tokens)
