"""Decoder layers of the Llama kind in a few launches each, on a CUDA device.

A layer is replaced by its class: those named below are known to compute what is written here, at
every position. What differs stays transformers' own.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from app.engines.inflight.attention import STEP
from app.engines.inflight.cache import LayerShape
from app.engines.inflight.paged import PagedStep, kernels

_KNOWN: Final = {
    f"transformers.models.{family.lower()}.modeling_{family.lower()}.{family}DecoderLayer"
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3")
}

_MOST: Final = 4096
"""Columns that one program takes of a wide row."""


class FusedLayer(nn.Module):
    """Holds the layer's weights, those that have the same input as one matrix."""

    def __init__(self, layer: Any, shape: LayerShape, how: dict[str, float]) -> None:
        super().__init__()
        attn, mlp = layer.self_attn, layer.mlp
        projections = [attn.q_proj, attn.k_proj, attn.v_proj]
        self._layer = int(attn.layer_idx)
        self._shape = shape
        self._how: dict[str, Any] = dict(how)
        self.qkv = _stacked(projections)
        biases = [each.bias.detach() for each in projections if each.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.mixed = attn.o_proj.weight.detach()
        self.gated = _stacked([mlp.gate_proj, mlp.up_proj])
        self.down = mlp.down_proj.weight.detach()
        self.norms = [
            (norm.weight.detach(), float(norm.variance_epsilon))
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        self.head_norms = [
            (norm.weight.detach(), float(norm.variance_epsilon))
            for norm in (getattr(attn, "q_norm", None), getattr(attn, "k_norm", None))
            if norm is not None
        ]

    def forward(self, hidden_states: Tensor, **others: Any) -> Tensor:
        """[1, tokens, width] → the same, in the same memory."""
        step: PagedStep = others[STEP]
        cos, sin = others["position_embeddings"]
        x = hidden_states.flatten(0, 1)
        both = linear(_normalised(step.compiled, x, *self.norms[0]), self.qkv, self.bias)
        query = self._rotated(step, both, cos[0], sin[0])
        mixed = step.mix(self._layer, query, **self._how)
        x.addmm_(mixed.flatten(1), self.mixed.T)
        gates = linear(_normalised(step.compiled, x, *self.norms[1]), self.gated)
        x.addmm_(_gated(step.compiled, gates), self.down.T)
        return x[None]

    def _rotated(self, step: PagedStep, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Keep keys and values; the rotated queries, [tokens, heads, dim]."""
        shape, cache = self._shape, step.cache
        heads = shape.kv_heads * shape.group
        query_gain, key_gain = [gain for gain, _ in self.head_norms] or [cos, cos]
        step.compiled.rotate_and_keep[(len(qkv), heads + 2 * shape.kv_heads)](
            qkv,
            cos,
            sin,
            step.slots,
            cache.keys[self._layer],
            cache.values[self._layer],
            query_gain,
            key_gain,
            self.head_norms[0][1] if self.head_norms else 0.0,
            HEADS=heads,
            KV_HEADS=shape.kv_heads,
            DIM=shape.dim,
            BLOCK=1 << (shape.dim // 2 - 1).bit_length(),
            NORM=bool(self.head_norms),
            num_warps=1,
        )
        return qkv.view(len(qkv), -1, shape.dim)[:, :heads]


def fuse_layers(model: PreTrainedModel, shapes: list[LayerShape], how: dict[int, Any]) -> None:
    """Replace the layers that are known; `how` each asks for attention, as the probe found."""
    if kernels(model.device) is None:
        return
    for name, layer in list(model.named_modules()):
        if is_known(layer, shapes):
            place = layer.self_attn.layer_idx
            model.set_submodule(name, FusedLayer(layer, shapes[place], how[place]))


def is_known(layer: Any, shapes: list[LayerShape]) -> bool:
    kind = type(layer)
    if f"{kind.__module__}.{kind.__qualname__}" not in _KNOWN:
        return False
    attn, mlp = layer.self_attn, layer.mlp
    linears = [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    biases = [each.bias is not None for each in linears[:3]]
    return (
        all(type(each) is nn.Linear for each in linears)
        and all(each.bias is None for each in linears[3:])
        and len(set(biases)) == 1
        and attn.config.hidden_act == "silu"
        and shapes[attn.layer_idx].dim % 2 == 0
    )


def _stacked(linears: list[nn.Linear]) -> Tensor:
    """The outputs of all, one after the other; each layer's own memory is then a part of it."""
    weight = torch.cat([each.weight.detach() for each in linears])
    parts = torch.split(weight, [each.out_features for each in linears])
    for each, part in zip(linears, parts, strict=True):
        each.weight = nn.Parameter(part, requires_grad=False)  # frees what it had
    return weight


def _normalised(compiled: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    width = x.shape[1]
    block = 1 << (width - 1).bit_length()
    compiled.normalise[(len(x),)](
        x, weight, out, eps, WIDTH=width, BLOCK=block, num_warps=min(16, max(1, block // 512))
    )
    return out


def _gated(compiled: Any, both: Tensor) -> Tensor:
    inner = both.shape[1] // 2
    out = both.new_empty(len(both), inner)
    block = min(_MOST, 1 << (inner - 1).bit_length()) // 4
    compiled.gate[(len(both), -(-inner // block))](both, out, INNER=inner, BLOCK=block, num_warps=4)
    return out
