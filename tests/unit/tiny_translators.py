"""Tiny translators with tokenizers of their own kinds, saved as real model folders."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    NllbTokenizer,
    PreTrainedModel,
)

ENGLISH: Final = [
    "The mill grinds the grain of the valley.",
    "Water runs down to the old mill by the river.",
    "A stone turns, and flour falls into the bag.",
    "The miller's daughter counts the bags, one by one.",
    "Where is the wheel? It is behind the house!",
]
GERMAN: Final = [
    "Die Mühle mahlt das Korn des Tales.",
    "Wasser fließt zur alten Mühle am Fluss hinab.",
    "Ein Stein dreht sich, und Mehl fällt in den Sack.",
    "Die Tochter des Müllers zählt die Säcke, einen nach dem anderen.",
    "Wo ist das Rad? Es ist hinter dem Haus!",
]
CONTEXT: Final = 64
SIZES: Final[dict[str, Any]] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": CONTEXT,
    "forced_eos_token_id": 0,
}


def save_marian(folder: Path, targets: Seq[str] = ()) -> Path:
    """As in Helsinki's folders: source.spm, target.spm, vocab.json and no tokenizer.json."""
    folder.mkdir(parents=True)
    source, target = _train(folder / "source.spm", ENGLISH), _train(folder / "target.spm", GERMAN)
    left_out = {piece for piece in source if piece not in target and piece.endswith("w")}
    codes = [f">>{code}<<" for code in targets]
    pieces = [it for it in (*codes, *source, *target) if it not in left_out]
    texts = [*dict.fromkeys(["</s>", "<unk>", *pieces, "<pad>"])]
    (folder / "vocab.json").write_text(json.dumps({text: i for i, text in enumerate(texts)}))
    names = {"source_lang": "en", "target_lang": "mul" if targets else "de"}
    texts_of = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    _write(folder, tokenizer_class="MarianTokenizer", model_max_length=CONTEXT, **names, **texts_of)
    pad = len(texts) - 1
    config = MarianConfig(
        vocab_size=len(texts),
        eos_token_id=0,
        pad_token_id=pad,
        decoder_start_token_id=pad,
        bad_words_ids=[[pad]],
        num_beams=4,
        **SIZES,
    )
    return _save(MarianMTModel(config), folder)


def save_m2m100(folder: Path) -> Path:
    """As Facebook's: sentencepiece.bpe.model and vocab.json, with the languages behind it."""
    from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES

    folder.mkdir(parents=True)
    pieces = _train(folder / "sentencepiece.bpe.model", [*ENGLISH, *GERMAN])
    texts = [*dict.fromkeys(["<s>", "<pad>", "</s>", "<unk>", *pieces])]
    (folder / "vocab.json").write_text(json.dumps({text: i for i, text in enumerate(texts)}))
    codes = [f"__{code}__" for code in FAIRSEQ_LANGUAGE_CODES["m2m100"]]
    texts_of = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "special_tokens_map.json").write_text(
        json.dumps(texts_of | {"additional_special_tokens": codes})
    )
    _write(folder, tokenizer_class="M2M100Tokenizer", model_max_length=CONTEXT, **texts_of)
    config = M2M100Config(vocab_size=len(texts) + len(codes) + 8, **_FAIRSEQ, num_beams=5)
    return _save(M2M100ForConditionalGeneration(config), folder)


def save_nllb(folder: Path) -> Path:
    letters = sorted({letter for line in [*ENGLISH, *GERMAN] for letter in line if letter != " "})
    texts = ["<s>", "<pad>", "</s>", "<unk>", "▁", *letters, "▁t", "▁th", "▁the"]
    vocab = {text: place for place, text in enumerate(texts)}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    NllbTokenizer(vocab=vocab, merges=merges, model_max_length=CONTEXT).save_pretrained(folder)
    config = M2M100Config(vocab_size=len(texts) + 220, **_FAIRSEQ)
    return _save(M2M100ForConditionalGeneration(config), folder)


def save_mbart(folder: Path, *, fifty: bool) -> Path:
    letters = sorted({letter for line in [*ENGLISH, *GERMAN] for letter in line if letter != " "})
    texts = ["<s>", "<pad>", "</s>", "<unk>", "▁", *letters, "▁the", "▁die", "mill"]
    vocab = [(text, -float(place)) for place, text in enumerate(texts)]
    make = MBart50Tokenizer if fifty else MBartTokenizer
    make(vocab=vocab, model_max_length=CONTEXT).save_pretrained(folder)
    config = MBartConfig(vocab_size=len(texts) + 70, **_FAIRSEQ)
    return _save(MBartForConditionalGeneration(config), folder)


_FAIRSEQ: Final = SIZES | {
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}


def _train(file: Path, lines: Seq[str]) -> list[str]:
    """A SentencePiece model, and its pieces."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        vocab_size=90,
        model_type="unigram",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    file.write_bytes(written.getvalue())
    library = SentencePieceProcessor(model_file=str(file))
    pieces = [library.id_to_piece(place) for place in range(library.get_piece_size())]
    return [piece for piece in pieces if not library.is_control(library.piece_to_id(piece))]


def _write(folder: Path, **texts: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(texts))


def _save(model: PreTrainedModel, folder: Path) -> Path:
    torch.manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)
    model.tie_weights()
    model.eval().save_pretrained(folder)
    return folder
