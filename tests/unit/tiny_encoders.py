"""Tiny encoders with random weights, one of each family, saved as real model folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForTextEncoding,
)
from transformers import AutoModelForSequenceClassification as AutoClassifier

from tests.unit import tiny_models
from tests.unit.tiny_models import CONTEXT, VOCAB

_COMMON: Final[dict[str, Any]] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 257,
    "eos_token_id": 256,
}
_BEHIND_PADDING: Final[dict[str, Any]] = {
    "pad_token_id": 1,
    "max_position_embeddings": CONTEXT + 2,
    "type_vocab_size": 1,
}
"""Positions 0 and 1 belong to padding."""
FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "bert": {"type_vocab_size": 2},
    "roberta": _BEHIND_PADDING,
    "xlm-roberta": _BEHIND_PADDING,
    "camembert": _BEHIND_PADDING,
    "data2vec-text": _BEHIND_PADDING,
    "mpnet": _BEHIND_PADDING,
    "longformer": _BEHIND_PADDING | {"attention_window": [8, 8]},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    "deberta": {"pos_att_type": ["c2p", "p2c"], "relative_attention": True, "type_vocab_size": 0},
    "deberta-v2": {
        "pos_att_type": ["c2p", "p2c"],
        "relative_attention": True,
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "modernbert": {"local_attention": 16, "cls_token_id": 1, "sep_token_id": 2},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "mobilebert": {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "megatron-bert": {},
    "ernie": {},
    "eurobert": {"mask_token_id": 3, "num_key_value_heads": 4},
    "nomic_bert": {},
    "squeezebert": {"embedding_size": 32},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
}
DECODERS: Final[dict[str, dict[str, Any]]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
}
"""Families of decoders that classify by their last token."""
MINDS_PADDING: Final[dict[str, dict[str, Any]]] = {
    "big_bird": {"block_size": 4, "num_random_blocks": 1, "attention_type": "block_sparse"},
    "convbert": {"embedding_size": 16, "conv_kernel_size": 3, "head_ratio": 2},
    "fnet": {"tpu_short_seq_length": CONTEXT},
}
"""Families whose answers depend on what is padded beside a text."""


def save_encoder(folder: Path, family: str, *, masked: bool = False, **config: Any) -> Path:
    """An encoder, or with `masked` the masked language model that it was trained as."""
    return _save(folder, family, AutoModelForMaskedLM if masked else auto_class(family), **config)


def auto_class(family: str) -> Any:
    """What transformers makes an encoder of this family with."""
    return AutoModelForTextEncoding if family == "t5" else AutoModel


def save_classifier(folder: Path, family: str = "bert", labels: int = 3, **config: Any) -> Path:
    """A classifier, or with one label a cross-encoder."""
    return _save(folder, family, AutoClassifier, num_labels=labels, **config)


def _save(folder: Path, family: str, auto: Any, **more: Any) -> Path:
    torch.manual_seed(7)
    given = _COMMON | (FAMILIES | MINDS_PADDING | DECODERS)[family] | more
    if family == "xlnet":  # knows no limit
        del given["max_position_embeddings"]
    config = AutoConfig.for_model(family, **given)
    return tiny_models.save(auto.from_config(config), folder, template=None, pairs=True)
