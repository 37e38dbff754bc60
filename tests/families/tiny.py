"""A tiny model of any family of transformers, with random weights, saved as a model folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB: Final = 97
CONTEXT: Final = 192
LAYERS: Final = 2

_SIZES: Final[dict[str, Any]] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 64),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner"), 96),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), CONTEXT),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    "vocab_size": VOCAB,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "d_kv": 16,
    "num_experts_per_tok": 2,
    "rotary_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""By the names that configurations have for them; a family takes those that it knows."""


@dataclass(frozen=True)
class Family:
    kind: str  #: model_type
    fields: dict[str, Any] = field(default_factory=dict)  #: of its configuration
    variant: str = ""  #: what these fields are about, for people

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.variant}" if self.variant else self.kind

    def config(self) -> PreTrainedConfig:
        config_class = CONFIG_MAPPING[self.kind]
        known = {
            name
            for each in config_class.__mro__
            for name in (*getattr(each, "__annotations__", ()), *getattr(each, "attribute_map", ()))
        }
        aliases = getattr(config_class, "attribute_map", {})
        sizes = {
            name: size
            for name, size in _SIZES.items()
            if name in known and aliases.get(name) not in _SIZES | self.fields
        }
        return config_class(**sizes | self.fields)

    def save(self, folder: Path, auto_class: Any) -> Path:
        """The model with a tokenizer of words, `w0` to `w96`."""
        torch.manual_seed(sum(self.name.encode()))
        model = auto_class.from_config(self.config(), dtype=torch.float32)
        _fill(model)
        model.save_pretrained(folder)
        words = Tokenizer(models.WordLevel({f"w{place}": place for place in range(VOCAB)}, "w0"))
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
        return folder


def _fill(model: PreTrainedModel) -> None:
    """Weights of the usual small size give nearly equal scores, and hide what is left out: zeros of
    biases, ones of norms."""
    sizes: dict[type[nn.Module], float] = {nn.Linear: 0.3, nn.Embedding: 0.1}
    wide = {
        id(module.weight): sizes[kind]
        for kind in sizes
        for module in model.modules()
        if isinstance(module, kind)
    }
    with torch.no_grad():
        for weight in model.parameters():
            if id(weight) in wide or weight.ndim == 3:
                weight.normal_(0, wide.get(id(weight), 0.3))
            elif weight.is_floating_point():
                weight.add_(torch.randn_like(weight), alpha=0.3)
    model.tie_weights()
