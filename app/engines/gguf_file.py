"""From the GGUF file of a SmolLM2 model to a safetensors folder that transformers loads.

    python -m app.engines.gguf_file MODEL.gguf FOLDER

Quantized weights are expanded once and stored as float16: its 11 bits keep a 4- or 5-bit weight to
one part in 2,000 where bfloat16 keeps one in 250, in the same two bytes. The engine computes in the
dtype of its own settings. Runs as a process of its own, so that whoever prepares a model does not
keep torch and a second copy of the weights in memory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from app.errors import ConfigError

_NAMES: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(file: Path, folder: Path) -> None:
    """Write config, tokenizer, chat template, generation settings and weights into `folder`.

    Raises `ConfigError` if the file is of another family or a weight does not arrive intact.
    """
    reader = GGUFReader(file)
    config = _config(reader)
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    # A GGUF file only names how text is split before BPE, and transformers assumes GPT-2's way.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    heads: dict[str, int] = {
        "attn_q": reader.fields["llama.attention.head_count"].contents(),
        "attn_k": reader.fields["llama.attention.head_count_kv"].contents(),
    }
    weights = {}
    for tensor in reader.tensors:
        name, kind = _name(tensor.name)
        exact = dequantize(tensor.data, tensor.tensor_type)
        stored = _interleaved(exact, heads[kind]) if kind in heads else exact
        weights[name] = np.ascontiguousarray(stored, dtype=np.float16)
        if not np.allclose(weights[name], stored, rtol=2**-10, atol=1e-7):
            raise ConfigError(f"{file.name}: the weight {tensor.name} does not fit float16.")

    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    GenerationConfig.from_dict(ends).save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _verify(folder)


def _config(reader: GGUFReader) -> LlamaConfig:
    def field(name: str) -> Any:
        return reader.fields[name].contents()

    kind = field("general.architecture"), field("tokenizer.ggml.pre")
    if kind != ("llama", "smollm"):
        raise ConfigError("This is not a SmolLM2 model; give a safetensors folder instead.")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float16",
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
    )


def _name(gguf_name: str) -> tuple[str, str]:
    """blk.3.attn_q.weight → (model.layers.3.self_attn.q_proj.weight, attn_q)."""
    match gguf_name.split("."):
        case ["blk", layer, kind, "weight"] if kind in _NAMES:
            return f"model.layers.{layer}.{_NAMES[kind]}.weight", kind
        case [kind, "weight"] if kind in _NAMES:
            return f"{_NAMES[kind]}.weight", kind
    raise ConfigError(f"The GGUF file has a weight that Llama models lack: {gguf_name}.")


def _interleaved(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rotary embedding: GGUF pairs neighbouring rows of a head, transformers pairs its halves."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _verify(folder: Path) -> None:
    """Every weight the model expects is there and finite, and no other."""
    load: Any = AutoModelForCausalLM.from_pretrained  # its type misses the second result
    model, report = load(folder, output_loading_info=True)
    wrong = {what: sorted(names) for what, names in report.items() if names}
    if wrong:
        raise ConfigError(f"The converted model is not whole: {wrong}.")
    if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
        raise ConfigError("The converted model has weights that are not finite.")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
