"""Models of well-known shapes with random weights, for where none can be had.

    --model random:llama-3.2-1b

How long a step takes does not depend on what the weights are. What the model answers does.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from app.engines.device import pick_device, pick_dtype
from app.errors import ConfigError

PREFIX: Final = "random:"

SHAPES: Final[dict[str, dict[str, Any]]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "qwen3-1.7b": {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}

_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json")


def make(source: str, tokenizer: Path, folder: Path, device: str, dtype: str) -> Path:
    """A model folder in `folder`, made anew; texts are cut by the tokenizer in another folder."""
    name = source.removeprefix(PREFIX)
    if name not in SHAPES:
        raise ConfigError(f"There is no shape {name}; known are {', '.join(SHAPES)}.")
    shape = {
        "max_position_embeddings": 8192,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        **SHAPES[name],
    }
    config = AutoConfig.for_model(**shape)
    place = pick_device(device)
    torch.manual_seed(0)
    with torch.device(place):
        model = AutoModelForCausalLM.from_config(config, dtype=pick_dtype(dtype, place))  # type: ignore[no-untyped-call]
    target = folder / name
    model.save_pretrained(target)
    for file in _TOKENIZER_FILES:
        shutil.copy(tokenizer / file, target)
    return target
