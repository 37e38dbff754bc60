"""From the GGUF file of a decoder to a safetensors folder that transformers loads.

    python -m app.engines.checkpoint.gguf_file MODEL.gguf FOLDER

Quantized weights are expanded once and stored as float16: its 11 bits keep a 4- or 5-bit weight to
one part in 2,000 where bfloat16 keeps one in 250, in the same two bytes. Where one does not fit,
all are stored as float32. The engine computes in the dtype of its own settings. Runs as a process
of its own, so that whoever prepares a model does not keep torch and a second copy of the weights.

What the file says and this does not know is refused by name: a model that is read in part is
another model. Keys and tensors: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from app.engines.checkpoint.gguf_tokenizer import save_tokenizer
from app.errors import ConfigError
from app.printable import in_a_line

_KINDS: Final = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""Architectures of GGUF, and what transformers calls them."""

_SIZES: Final = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
"""Metadata behind the architecture's name, and fields of the configuration."""

_READ_BY_CODE: Final = {
    *("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
}
_WITHOUT_EFFECT: Final = {"rope.scaling.finetuned"}

_NAMES: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS: Final = "rope_freqs"
"""By what each frequency of the rotary embedding is divided."""

Weights = dict[str, NDArray[np.float32]]


def convert(file: Path, folder: Path) -> None:
    """Write config, tokenizer, chat template, generation settings and weights into `folder`.

    Raises `ConfigError` if the file cannot be read, or holds what is not known here.
    """
    try:
        reader = GGUFReader(file)
        architecture = str(_field(reader, "general.architecture"))
    except Exception as error:  # of the library, which expects a whole file
        raise ConfigError(f"{file.name} is no whole GGUF file ({in_a_line(error)}).") from error
    if architecture not in _KINDS:
        raise ConfigError(
            f"GGUF files of the architecture {architecture} are not read, only those of "
            f"{', '.join(_KINDS)}; take the model's folder with safetensors weights."
        )
    if _field(reader, "split.count", 1) > 1:
        raise ConfigError(f"{file.name} is one of several parts; merge them with gguf-split.")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(reader, architecture, tensors)
    weights = _weights(tensors, architecture, config)
    kind = np.float16 if all(_fits(weight) for weight in weights.values()) else np.float32
    config.dtype = np.dtype(kind).name
    stored = {name: np.ascontiguousarray(weight, kind) for name, weight in weights.items()}
    config.save_pretrained(folder)
    ends = save_tokenizer(file, folder)
    GenerationConfig.from_dict(
        {"eos_token_id": ends or None, "pad_token_id": config.pad_token_id}
    ).save_pretrained(folder)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    _verify(folder)


def _field(reader: GGUFReader, name: str, missing: Any = None) -> Any:
    field = reader.fields.get(name)
    return missing if field is None else field.contents()


def _config(
    reader: GGUFReader, architecture: str, tensors: dict[str, ReaderTensor]
) -> PreTrainedConfig:
    """Raises `ConfigError` for keys of the architecture that nothing here reads."""
    own = {
        name.removeprefix(f"{architecture}."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(f"{architecture}.")
    }
    if strange := sorted(own.keys() - _SIZES.keys() - _READ_BY_CODE - _WITHOUT_EFFECT):
        raise ConfigError(f"The GGUF file says {', '.join(strange)}, which is not read here.")
    heads = own["attention.head_count"]
    dim = own.get("attention.key_length", own["embedding_length"] // heads)
    turned = own.get("rope.dimension_count", dim)
    if not dim == own.get("attention.value_length", dim) == turned:
        raise ConfigError("The GGUF file has keys, values and rotated parts of different sizes.")
    given = {field: own[name] for name, field in _SIZES.items() if name in own}
    vocabulary = len(_field(reader, "tokenizer.ggml.tokens", ()))
    special = {
        f"{name}_token_id": _field(reader, f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return AutoConfig.for_model(
        _KINDS[architecture],
        **{"num_key_value_heads": heads, "vocab_size": vocabulary} | given,
        head_dim=dim,
        rope_parameters=_rope(own, tensors.get(f"{_ROPE_FACTORS}.weight")),
        attention_bias="blk.0.attn_q.bias" in tensors,
        tie_word_embeddings="output.weight" not in tensors,
        architectures=[f"{_KINDS[architecture].capitalize()}ForCausalLM"],
        **special,
    )


def _rope(own: dict[str, Any], factors: ReaderTensor | None) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10_000.0)}
    scaling = own.get("rope.scaling.type", "none")
    if factors is not None:
        # transformers knows tables of factors for short and long texts; here they are one.
        table = dequantize(factors.data, factors.tensor_type).ravel().tolist()
        return rope | {
            "rope_type": "longrope",
            "short_factor": table,
            "long_factor": table,
            "attention_factor": 1.0,
            "factor": 1.0,
            "original_max_position_embeddings": own["context_length"],
        }
    if scaling == "none":
        return rope
    if scaling not in ("linear", "yarn"):
        raise ConfigError(f"The GGUF file scales positions by {scaling}, which is not read here.")
    rope |= {"rope_type": scaling, "factor": own["rope.scaling.factor"]}
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = own["rope.scaling.original_context_length"]
    return rope


def _weights(
    tensors: dict[str, ReaderTensor], architecture: str, config: PreTrainedConfig
) -> Weights:
    """All tensors by transformers' names, as float32. Raises `ConfigError` for unknown ones."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights: Weights = {}
    for tensor in tensors.values():
        if tensor.name == f"{_ROPE_FACTORS}.weight":
            continue
        name, kind = _name(tensor.name)
        weight = dequantize(tensor.data, tensor.tensor_type)
        if architecture == "llama" and kind in heads:
            weight = _interleaved(weight, heads[kind])
        weights[name] = weight
    return weights


def _name(gguf_name: str) -> tuple[str, str]:
    """blk.3.attn_q.weight → (model.layers.3.self_attn.q_proj.weight, attn_q)."""
    match gguf_name.split("."):
        case ["blk", layer, kind, "weight" | "bias" as part] if kind in _NAMES:
            return f"model.layers.{layer}.{_NAMES[kind]}.{part}", kind
        case [kind, "weight" | "bias" as part] if kind in _NAMES:
            return f"{_NAMES[kind]}.{part}", kind
    raise ConfigError(f"The GGUF file has a weight that is not known here: {gguf_name}.")


def _interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rotary embedding: Llama's GGUF files pair neighbouring rows of a head, transformers pairs its
    halves."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _fits(weight: NDArray[np.float32]) -> bool:
    """Whether float16 holds it. Infinite is what does not fit, not an error of ours."""
    with np.errstate(over="ignore"):
        return bool(np.allclose(weight.astype(np.float16), weight, rtol=2**-10, atol=1e-7))


def _verify(folder: Path) -> None:
    """Every weight the model expects is there and finite, and no other."""
    load: Any = AutoModelForCausalLM.from_pretrained  # its type misses the second result
    try:
        model, report = load(folder, output_loading_info=True)
    except Exception as error:
        raise ConfigError(f"The converted model cannot be loaded: {in_a_line(error)}.") from error
    wrong = {what: sorted(names)[:3] for what, names in report.items() if names}
    if wrong:
        raise ConfigError(f"The converted model is not whole: {wrong}.")
    if not _is_finite(model):
        raise ConfigError("The converted model has weights that are not finite.")


def _is_finite(model: PreTrainedModel) -> bool:
    return all(bool(torch.isfinite(weight).all()) for weight in model.parameters())


if __name__ == "__main__":
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except ConfigError as refusal:
        sys.exit(str(refusal))
