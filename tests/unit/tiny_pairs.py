"""Tiny encoder-decoders with random weights, saved as real model folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BigBirdPegasusConfig,
    BigBirdPegasusForConditionalGeneration,
    LEDConfig,
    LEDForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedModel,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from tests.unit import tiny_models
from tests.unit.tiny_models import BOS, CONTEXT, EOS, PAD, VOCAB

_TOKENS: dict[str, Any] = {
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": None,
}
_BART: dict[str, Any] = _TOKENS | {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": CONTEXT,
}
_T5: dict[str, Any] = _TOKENS | {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "n_positions": CONTEXT,
}
_PROPHET: dict[str, Any] = _TOKENS | {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_LED = _BART | {
    "attention_window": [8, 8],
    "max_encoder_position_embeddings": CONTEXT,
    "max_decoder_position_embeddings": CONTEXT,
}
_LED.pop("max_position_embeddings")
_LOW_PAD = {"pad_token_id": 1}  # these count places from it on
_MOE = {"num_experts": 2, "num_decoder_layers": 2, "expert_capacity": 4}

PAIRS: Final[dict[str, Any]] = {
    "bart": lambda: BartForConditionalGeneration(BartConfig(**_BART)),
    "big_bird": lambda: BigBirdPegasusForConditionalGeneration(
        BigBirdPegasusConfig(**_BART, block_size=4, num_random_blocks=1)
    ),
    "led": lambda: LEDForConditionalGeneration(LEDConfig(**_LED)),
    "m2m_100": lambda: M2M100ForConditionalGeneration(M2M100Config(**_BART | _LOW_PAD)),
    "marian": lambda: MarianMTModel(MarianConfig(**_BART)),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**_BART)),
    "mt5": lambda: MT5ForConditionalGeneration(MT5Config(**_T5)),
    "pegasus": lambda: PegasusForConditionalGeneration(PegasusConfig(**_BART)),
    "prophetnet": lambda: ProphetNetForConditionalGeneration(
        ProphetNetConfig(**_PROPHET | {"pad_token_id": 0})
    ),
    "switch": lambda: SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(**_T5, **_MOE)
    ),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**_T5)),
    "umt5": lambda: UMT5ForConditionalGeneration(UMT5Config(**_T5)),
}


def save_pair(kind: str, folder: Path, **generation: Any) -> Path:
    """A model of one of `PAIRS`, with these generation settings of its own."""
    torch.manual_seed(6)
    model: PreTrainedModel = PAIRS[kind]().eval()
    tiny_models.save(model, folder, adds_eos=True, template=None)
    file = folder / "generation_config.json"
    own = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(own | generation))
    return folder
