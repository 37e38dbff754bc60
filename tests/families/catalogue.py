"""Every family of models that is tried: each runs as transformers has it, or is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tests.families.tiny import Family
from tests.unit import tiny_encoders

_BOTH: Final = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 20}
_LATENT: Final = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
    "num_key_value_heads": 4,
}


_PER_LAYER: Final = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 97}


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **fields}}


DECODERS: Final = [
    Family("afmoe"),
    Family("apertus"),
    Family("arcee"),
    Family("bamba", {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16}),
    Family("biogpt"),
    Family("bitnet"),
    Family("bloom"),
    Family("codegen"),
    Family("cohere"),
    Family("cohere2"),
    Family("cohere2_moe"),
    Family("ctrl", {"dff": 96}),
    Family("cwm"),
    Family("deepseek_v2", _LATENT),
    Family("deepseek_v3", _LATENT | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    Family("diffllama"),
    Family("doge"),
    Family(
        "dots1",
        {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
    ),
    Family("ernie4_5"),
    Family("ernie4_5_moe"),
    Family("exaone4", _BOTH),
    Family("exaone_moe"),
    Family("falcon"),
    Family("falcon", {"alibi": True}, "alibi"),
    Family("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, "grouped queries"),
    Family("falcon_mamba"),
    Family("flex_olmo"),
    Family("gemma"),
    Family("gemma2", _BOTH | {"query_pre_attn_scalar": 16}),
    Family("gemma3_text", _BOTH | {"query_pre_attn_scalar": 16}),
    Family(
        "gemma3n_text",
        _PER_LAYER
        | {
            "layer_types": ["sliding_attention", "full_attention"],
            "activation_sparsity_pattern": [0.0, 0.0],
            "num_kv_shared_layers": 0,
        },
    ),
    Family("gemma4_text", _PER_LAYER | _BOTH | {"num_kv_shared_layers": 0, "global_head_dim": 16}),
    Family("glm"),
    Family("glm4"),
    Family("glm4_moe"),
    Family("gpt2"),
    Family("gpt_bigcode"),
    Family("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 20}),
    Family("gpt_neox"),
    Family("gpt_neox_japanese"),
    Family("gpt_oss", {"sliding_window": 20}),
    Family("gptj"),
    Family("granite"),
    Family("granitemoe"),
    Family("granitemoehybrid", {"layer_types": ["mamba", "attention"]}),
    Family("granitemoeshared"),
    Family("helium"),
    Family("hunyuan_v1_dense"),
    Family("hunyuan_v1_moe"),
    Family("internlm3"),
    Family("jais2"),
    Family("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    Family("jetmoe"),
    Family("lfm2"),
    Family("llama"),
    Family("llama", _rope("linear", factor=2.0), "linear rope"),
    Family("llama", _rope("dynamic", factor=2.0), "dynamic rope"),
    Family(
        "llama",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=48,
        ),
        "rope of Llama 3",
    ),
    Family("llama", _rope("yarn", factor=4.0, original_max_position_embeddings=48), "yarn"),
    Family("llama4_text"),
    Family("mamba"),
    Family("mamba2", {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16}),
    Family("minicpm3", _LATENT),
    Family("minimax"),
    Family("minimax_m2"),
    Family("ministral", _BOTH),
    Family(
        "ministral3",
        _rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=48,
            llama_4_scaling_beta=0.1,
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
    ),
    Family("mistral", {"sliding_window": 20}),
    Family("mixtral"),
    Family("mpt"),
    Family("nanochat"),
    Family("nemotron"),
    Family("nemotron_h"),
    Family("olmo"),
    Family("olmo2"),
    Family("olmo3", {"sliding_window": 20}),
    Family("olmo_hybrid"),
    Family("olmoe"),
    Family("openai-gpt"),
    Family("opt"),
    Family("persimmon"),
    Family("phi"),
    Family("phi3", {"sliding_window": 20}),
    Family(
        "phi3",
        {
            **_rope("longrope", short_factor=[1.0] * 8, long_factor=[2.0] * 8),
            "original_max_position_embeddings": 48,
        },
        "longrope",
    ),
    Family("phimoe"),
    Family("qwen2", _BOTH | {"use_sliding_window": True}),
    Family("qwen2_moe"),
    Family("qwen3"),
    Family("qwen3_moe"),
    Family("recurrent_gemma", {"num_hidden_layers": 3, "lru_width": 64}),
    Family("rwkv"),
    Family("seed_oss"),
    Family("smollm3", {"no_rope_layers": [1, 0]}),
    Family("solar_open"),
    Family("stablelm"),
    Family("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}, "parallel"),
    Family("starcoder2"),
    Family("vaultgemma", _BOTH),
    Family("xglm"),
    Family("youtu", _LATENT),
]

_FREE: Final = {"forced_bos_token_id": None, "forced_eos_token_id": None}
_START: Final = {"decoder_start_token_id": 0}

ENCODER_DECODERS: Final = [
    Family("bart", _FREE | _START),
    Family("bigbird_pegasus", _FREE | _START | {"attention_type": "original_full"}),
    Family("blenderbot", _FREE | _START),
    Family("blenderbot-small", _FREE | _START),
    Family(
        "fsmt", _FREE | _START | {"src_vocab_size": 97, "tgt_vocab_size": 97, "langs": ["a", "b"]}
    ),
    Family("led", _FREE | _START | {"attention_window": 8}),
    Family("longt5", _START),
    Family("m2m_100", _FREE | _START),
    Family("marian", _FREE | _START),
    Family("mbart", _FREE | _START),
    Family("mt5", _START),
    Family("mvp", _FREE | _START),
    Family("nllb-moe", _FREE | _START | {"expert_capacity": 64}),
    Family("pegasus", _FREE | _START),
    Family("pegasus_x", _FREE | _START),
    Family("plbart", _FREE | _START),
    Family("prophetnet", _FREE | _START),
    Family("switch_transformers", _START),
    Family("t5", _START),
    Family("umt5", _START),
]


@dataclass(frozen=True)
class Encoder:
    name: str  #: model_type
    classifies: bool = True

    @property
    def kind(self) -> str:
        return self.name


ENCODERS: Final = [
    Encoder(name, classifies=name != "t5")
    for name in sorted([*tiny_encoders.FAMILIES, "convbert", "fnet", "llama"])
]
