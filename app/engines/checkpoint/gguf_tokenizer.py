"""The tokenizer of a GGUF file as tokenizer.json, with its chat template beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from gguf import GGUFReader
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from app.errors import ConfigError

_SPLITS: Final[dict[str, PreTokenizer]] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
}
"""How text is split before BPE, by the names that files have for it; transformers, which knows
others, takes what it does not know for GPT-2's way."""

_KINDS: Final = ("gpt2", "llama")
"""Byte-level BPE, and SentencePiece's."""


def save_tokenizer(file: Path, folder: Path) -> list[int]:
    """Into `folder`; returns the ids that end a text. Raises `ConfigError` for what is not known:
    other tokens would be another model's."""
    fields = GGUFReader(file).fields

    def said(name: str, missing: Any = None) -> Any:
        field = fields.get(f"tokenizer.ggml.{name}")
        return missing if field is None else field.contents()

    kind, split = said("model"), said("pre", "default")
    if kind not in _KINDS:
        raise ConfigError(f"The GGUF file has a tokenizer of the kind {kind}, which is not read.")
    if kind == "gpt2" and split not in _SPLITS and split not in GGUF_PRE_TOKENIZER_SPLITS:
        raise ConfigError(f"The GGUF file splits text as {split}, which is not known here.")
    if kind == "llama" and said("add_space_prefix", True) is False:
        raise ConfigError("The GGUF file's tokenizer says add_space_prefix = false: not read here.")
    tokenizer: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    backend: Tokenizer = tokenizer.backend_tokenizer
    if kind == "gpt2" and split in _SPLITS:
        backend.pre_tokenizer = _SPLITS[split]
    tokens = said("tokens")
    begin = [said("bos_token_id")] if said("add_bos_token", kind == "llama") else []
    end = [said("eos_token_id")] if said("add_eos_token", False) else []
    around = [*(tokens[token] for token in begin), "$A", *(tokens[token] for token in end)]
    if begin or end:
        backend.post_processor = TemplateProcessing(
            single=" ".join(around), special_tokens=[(tokens[each], each) for each in begin + end]
        )
    tokenizer.save_pretrained(folder)
    ends = (said(name) for name in ("eos_token_id", "eot_token_id", "eom_token_id"))
    return sorted({token for token in ends if token is not None})
