"""Tiny models with random weights, saved as real model folders, for tests of the engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from app.config.settings import ModelSettings
from app.engines.base import Engine
from app.engines.registry import create
from app.jobs import Kind

VOCAB = 260
EOS, BOS, PAD = 256, 257, 258
CONTEXT = 96
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def save_tokenizer(
    folder: Path, *, adds_eos: bool = False, pairs: bool = False, template: str | None = TEMPLATE
) -> None:
    """One token a byte, then <eos>, <bos> and <pad>; with <bos> before or <eos> after a text.

    With `pairs` a text and a pair of them are between these, as BERT has it.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: place for place, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(["<eos>", "<bos>", "<pad>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>" if adds_eos else "<bos> $A",
        special_tokens=[("<eos>", EOS), ("<bos>", BOS)],
    )
    if pairs:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>",
            pair="<bos> $A <eos> $B:1 <eos>:1",
            special_tokens=[("<eos>", EOS), ("<bos>", BOS)],
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "<eos>", "special": True}  # an older way to write it
    texts: dict[str, Any] = {"bos_token": "<bos>", "eos_token": eos, "pad_token": "<pad>"}
    texts["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template is not None:
        texts["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(texts))


def save(model: PreTrainedModel, folder: Path, **tokenizer: Any) -> Path:
    # Weights of the usual small size give nearly equal logits, and every model the same text.
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)
    model.tie_weights()
    model.save_pretrained(folder)
    save_tokenizer(folder, **tokenizer)
    return folder


def save_llama(folder: Path, vocab_size: int = VOCAB) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return save(LlamaForCausalLM(config), folder)


def save_gpt2(folder: Path) -> Path:
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return save(GPT2LMHeadModel(config), folder)


def save_t5(folder: Path) -> Path:
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        n_positions=CONTEXT,
        eos_token_id=EOS,
        pad_token_id=PAD,
        decoder_start_token_id=PAD,
    )
    return save(T5ForConditionalGeneration(config), folder, adds_eos=True, template=None)


def save_bert(folder: Path, *, modules: bool = True, pooling: str = "mean_tokens") -> Path:
    """A BERT, with sentence-transformers' files beside it if `modules`."""
    torch.manual_seed(4)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
    )
    save(BertModel(config), folder, template=None)
    if modules:
        save_pooling(folder, pooling)
    return folder


def save_pooling(folder: Path, pooling: str) -> None:
    """sentence-transformers' files: tokens are pooled this way, and the vector has length 1."""
    names = ["Transformer", "Pooling", "Normalize"]
    listed = [
        {"idx": i, "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.{name}"}
        for i, name in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, f"pooling_mode_{pooling}": True})
    )


def load(folder: Path, name: str = "inflight", rows: int = 8, **options: int) -> Engine:
    """A text engine with the model of a folder, in float32 on one thread."""
    model = ModelSettings(
        source=str(folder),
        kind=Kind.GENERATE,
        engine=name,
        dtype="float32",
        context_tokens=CONTEXT,
        max_batch_size=rows,
        options=dict(options),
    )
    return create(name, folder, model, device="cpu", threads=1, progress=lambda: None)
