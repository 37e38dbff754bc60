"""What the compiled products and layers compute is what torch and transformers compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from app.engines.inflight import native
from app.engines.inflight.attention import NAME, Packed, PortableStep, run
from app.engines.inflight.cache import BLOCK, KVCache, LayerShape
from app.engines.inflight.fused import FusedLayer, FusedLayers, fuse_layers
from app.engines.inflight.library import products
from app.engines.inflight.weights import NativeLinear
from tests.unit.inflight_tiny import FAMILIES

pytestmark = pytest.mark.skipif(
    products() is None, reason="this processor has no bfloat16 products that are ours"
)

_SIZES = {"head_dim": 32, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}

_TYPES = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 20}
_GEMMA = {**_TYPES, "query_pre_attn_scalar": 16}

PLAIN: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": True, "attention_bias": True},
    "mistral": {"sliding_window": 20},
    "ministral": _TYPES,
    "qwen2": {**_TYPES, "use_sliding_window": True},
    "qwen3": {},
    "gemma": {},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo": {},
    "olmo2": {},
    "olmo3": _TYPES,
    "granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.2},
    "phi3": {"sliding_window": 20},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": 20},
    "seed_oss": {},
}
"""Families whose layers are replaced, each with what sets it apart."""


@given(
    rows=st.integers(1, 40),
    inputs=st.integers(1, 80).map(lambda half: 2 * half),
    outputs=st.integers(1, 100),
    bias=st.booleans(),
)
@settings(deadline=None)
def test_a_product_is_right_for_any_shape(rows: int, inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(rows)
    linear = nn.Linear(inputs, outputs, bias=bias).bfloat16().requires_grad_(False)
    x = torch.randn(2, rows, inputs).bfloat16()

    got = NativeLinear(linear.weight, linear.bias)(x)

    wanted = linear.float()(x.float())
    torch.testing.assert_close(got.float(), wanted, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("family", PLAIN)
def test_every_plain_family_is_one_call_a_layer_that_gives_the_same(family: str) -> None:
    model, shapes = model_of(family)
    step, packed = steps()
    wanted = logits(model, PortableStep.of, shapes, packed)

    fuse_layers(model, shapes)

    layers = [each for each in model.modules() if isinstance(each, FusedLayer)]
    assert [each.layer.place for each in layers] == [0, 1]
    got = logits(model, step, shapes, packed)
    assert (got - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("family", PLAIN)
def test_layers_are_one_call_unless_the_model_rotates_each_in_its_own_way(family: str) -> None:
    model, shapes = model_of(family)
    fuse_layers(model, shapes)
    layers = [type(each) for each in model.get_submodule("model.layers").children()]
    assert layers == ([FusedLayer] * 2 if family in {"gemma3_text", "olmo3"} else [FusedLayers])


@pytest.mark.parametrize("family", ["gpt2", "ministral3", "cohere"])
def test_a_layer_of_an_unknown_class_stays_even_if_its_first_tokens_would_be_right(
    family: str,
) -> None:
    # Ministral 3 scales its queries, but only behind the first tokens.
    model, shapes = model_of(family)
    fuse_layers(model, shapes)
    assert not any(isinstance(each, FusedLayer) for each in model.modules())


def test_queries_that_are_bounded_are_left_to_the_layer() -> None:
    model, shapes = model_of("olmo", clip_qkv=0.5)
    fuse_layers(model, shapes)
    assert not any(isinstance(each, FusedLayer) for each in model.modules())


def test_a_layer_that_computes_something_else_stays() -> None:
    model, shapes = model_of("llama")
    layer: Any = model.get_submodule("model.layers.1")
    original = layer.forward
    layer.forward = lambda *inputs, **others: 1.1 * original(*inputs, **others)

    fuse_layers(model, shapes)

    assert model.get_submodule("model.layers.1") is layer
    assert isinstance(model.get_submodule("model.layers.0"), FusedLayer)


def test_without_bfloat16_nothing_is_replaced() -> None:
    model, shapes = model_of("llama", torch.float32)
    fuse_layers(model, shapes)
    assert not any(isinstance(each, FusedLayer) for each in model.modules())


def model_of(
    family: str, dtype: torch.dtype = torch.bfloat16, **fields: Any
) -> tuple[PreTrainedModel, list[LayerShape]]:
    torch.manual_seed(1)
    sizes = {**FAMILIES["llama"], **_SIZES, **PLAIN.get(family, {}), **fields}
    config = AutoConfig.for_model(family, **(FAMILIES["gpt2"] if family == "gpt2" else sizes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.set_attn_implementation(NAME)
    for name, part in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(part, std=0.3)
        if "norm" in name:
            nn.init.normal_(part, mean=0.3, std=0.3)
    shape = LayerShape(4, 16) if family == "gpt2" else LayerShape(2, 32)
    return model, [shape] * 2


def steps() -> tuple[Any, Packed]:
    """A maker of native steps; three sequences: of 45 tokens over two blocks, of 17, and of 1."""

    def native_step(cache: KVCache, packed: Packed, tables: np.ndarray) -> Any:
        kernel = native.load(cache)
        assert kernel is not None
        return native.NativeStep(kernel, packed, tables)

    counts = np.array([45, 17, 1])
    firsts = np.cumsum(counts) - counts
    positions = np.concatenate([np.arange(count) for count in counts])
    rows = np.repeat(np.arange(3), counts)
    packed = Packed(
        token_ids=np.random.default_rng(0).integers(0, 97, counts.sum()),
        positions=positions,
        slots=_TABLES[rows, positions // BLOCK] * BLOCK + positions % BLOCK,
        segments=np.stack([np.arange(3), firsts, counts, 0 * counts], axis=1).astype(np.int32),
        ends=firsts + counts - 1,
    )
    return native_step, packed


_TABLES = np.array([[3, 1], [0, 0], [2, 0]], np.int32)


def logits(
    model: PreTrainedModel, step_of: Any, shapes: list[LayerShape], packed: Packed
) -> torch.Tensor:
    step = step_of(KVCache(shapes, 4, model.dtype, model.device), packed, _TABLES)
    tensors = map(torch.from_numpy, (packed.token_ids, packed.positions, packed.ends))
    with torch.inference_mode():
        return run(model, step, *tensors).float()
