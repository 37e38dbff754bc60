"""Loading a decoder so that it attends through our cache, and refusing what would be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from app.config.settings import ModelSettings
from app.engines.checkpoint.loading import check_fits, load_model, read_config
from app.engines.device import pick_dtype
from app.engines.inflight import fused_cuda
from app.engines.inflight.attention import NAME, Asked, ProbeStep, run
from app.engines.inflight.cache import LayerShape
from app.engines.inflight.fused import fuse_layers
from app.engines.inflight.int8 import to_int8
from app.engines.inflight.library import multiplies_int8
from app.engines.inflight.weights import pack_linears
from app.engines.text.tokenizer import load_tokenizer
from app.errors import ConfigError
from app.printable import in_a_line

_LAYER_TYPES: Final = {"full_attention", "sliding_attention"}
_ROPE_TYPES_BY_LENGTH: Final = {"dynamic", "longrope"}
"""With these, how a token is rotated depends on the longest sequence in the batch."""


def load_decoder(
    folder: Path, dtype: str, weights: str, device: torch.device, context_tokens: int
) -> tuple[PreTrainedModel, list[LayerShape], int]:
    """The model, ready to run packed; what each of its layers keeps of a token; how wide its logits
    are, which may be more than the tokens that it knows.

    Raises `ConfigError` that names what the engine cannot do.
    """
    config = read_config(folder)
    _check(config.get_text_config(decoder=True), context_tokens)
    int8, on_host = weights == "int8", device.type == "cpu"
    if int8 and on_host and not (multiplies_int8() and pick_dtype(dtype, device) is torch.bfloat16):
        raise ConfigError(
            'weights = "int8" is for processors with AVX-512 VNNI and BF16, and dtype bfloat16; '
            "here it would only be slower. Set weights to full, or dtype to auto."
        )
    shrink = to_int8 if int8 and not on_host else None
    model = load_model(AutoModelForCausalLM, folder, dtype, device, shrink)
    model.set_attn_implementation(NAME)  # where a model does not heed this, the probe finds out
    probe = _probe(model, config.get_text_config(decoder=True).num_hidden_layers)
    if probe.has_sinks and device.type == "cuda":
        raise _refusal(f"the attention sinks of {config.model_type} have no kernel for CUDA")
    layers = [probe.layers[place] for place in range(len(probe.layers))]
    if shrink is None:
        fuse_layers(model, layers, int8=int8)
        fused_cuda.fuse_layers(model, layers, probe.how, context_tokens)
        pack_linears(model, int8=int8)
    return model, layers, probe.width


def decoder_fits(folder: Path, settings: ModelSettings) -> None:
    """Raises `ConfigError` for what can be seen without the weights."""
    context_tokens = load_tokenizer(folder, settings).context_tokens
    _check(read_config(folder).get_text_config(decoder=True), context_tokens)
    check_fits(AutoModelForCausalLM, folder)


def _check(config: Any, context_tokens: int) -> None:
    """Refuse by its configuration a model that would run and be wrong."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise _refusal(f"{kind} is an encoder-decoder")
    strange = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if strange:
        raise _refusal(f"{kind} has layers of the type {', '.join(sorted(strange))}")
    if getattr(config, "num_kv_shared_layers", 0):
        raise _refusal(f"layers of {kind} share their keys and values")
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in [ropes, *(each for each in ropes.values() if isinstance(each, dict))]:
        own = getattr(config, "max_position_embeddings", context_tokens)
        original = rope.get("original_max_position_embeddings", own)
        if rope.get("rope_type") in _ROPE_TYPES_BY_LENGTH and context_tokens > original:
            raise _refusal(
                f"{kind} rotates by the longest sequence of a batch ({rope['rope_type']}) beyond "
                f"{original} tokens; set context_tokens to {original}"
            )


def _probe(model: PreTrainedModel, num_layers: int) -> ProbeStep:
    """Run two tokens to see whether every layer attends through us, once, and what it keeps."""
    step = ProbeStep()
    tokens = torch.zeros(2, dtype=torch.int64, device=model.device)
    try:
        positions = torch.arange(2, device=model.device)
        step.width = run(model, step, tokens, positions, tokens[:1]).shape[-1]
    except Asked as error:
        raise _refusal(f"{model.config.model_type} does not run packed: {error}") from error
    except Exception as error:  # of code that was never meant to run so
        reason = in_a_line(error)
        raise _refusal(f"{model.config.model_type} does not run packed: {reason}") from error
    if sorted(step.layers) != list(range(num_layers)):
        raise _refusal(
            f"only {len(step.layers)} of the {num_layers} layers of {model.config.model_type} "
            "attend through transformers' attention interface"
        )
    return step


def _refusal(reason: str) -> ConfigError:
    return ConfigError(f"The engine inflight cannot run this model: {reason}. Use engine generate.")
