"""Decoders of the Llama kind on a CUDA device: eight launches a layer while all rows decode.

Layers are replaced by their class: those named below are known to compute what is written here, at
every position. With them go the last norm, and the rotary embedding, whose cosines and sines are
computed once for all positions. What differs stays transformers' own.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from app.engines.inflight.attention import STEP
from app.engines.inflight.cache import LayerShape
from app.engines.inflight.paged import PagedStep, Turn, kernels

_KNOWN: Final = {
    f"transformers.models.{family.lower()}.modeling_{family.lower()}.{family}DecoderLayer"
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3")
}

_ROPE_TYPES: Final = {"default", "linear", "llama3", "yarn"}
"""With these a token is rotated by its position alone."""

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

    @property
    def nbytes(self) -> int:
        """Of the weights that a step reads."""
        return sum(each.nbytes for each in (self.qkv, self.mixed, self.gated, self.down))

    def forward(self, hidden_states: Tensor, **others: Any) -> Tensor:
        """[1, tokens, width] → the same, in the same memory."""
        step: PagedStep = others[STEP]
        x = hidden_states.flatten(0, 1)
        qkv = linear(_normalised(step.compiled, x, *self.norms[0]), self.qkv, self.bias)
        qkv = qkv.view(len(qkv), -1, self._shape.dim)
        turn = self._turn(*others["position_embeddings"])
        if step.decodes:
            mixed = step.decode(self._layer, qkv, turn, **self._how)
        else:
            mixed = step.mix(self._layer, self._rotated(step, qkv, turn), **self._how)
        x.addmm_(mixed.flatten(1), self.mixed.T)
        gates = linear(_normalised(step.compiled, x, *self.norms[1]), self.gated)
        x.addmm_(_gated(step.compiled, gates), self.down.T)
        return x[None]

    def _turn(self, cos: Tensor, sin: Tensor) -> Turn:
        if not self.head_norms:
            return Turn(cos, sin, cos, sin, None)
        (query_gain, eps), (key_gain, _) = self.head_norms
        return Turn(cos, sin, query_gain, key_gain, eps)

    def _rotated(self, step: PagedStep, qkv: Tensor, turn: Turn) -> Tensor:
        """Keep keys and values; the queries, [tokens, heads, dim], are rotated where they are."""
        shape, cache = self._shape, step.cache
        heads = shape.kv_heads * shape.group
        step.compiled.rotate_and_keep[qkv.shape[:2]](
            qkv,
            step.positions,
            step.slots,
            cache.keys[self._layer],
            cache.values[self._layer],
            *turn.arguments,
            HEADS=heads,
            KV_HEADS=shape.kv_heads,
            DIM=shape.dim,
            BLOCK=1 << (shape.dim // 2 - 1).bit_length(),
            NORM=turn.eps is not None,
            num_warps=1,
        )
        return qkv[:, :heads]


class Rotary(nn.Module):
    """Cosines and sines [positions, dim] of all positions, whatever they are asked for."""

    def __init__(self, rotary: nn.Module, like: Tensor, num_positions: int) -> None:
        super().__init__()
        positions = torch.arange(num_positions, device=like.device)
        with torch.inference_mode():
            cos, sin = rotary(like, positions[None])
        self._both = cos[0].contiguous(), sin[0].contiguous()

    def forward(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._both


class Norm(nn.Module):
    """The norm behind the last layer."""

    def __init__(self, norm: Any, compiled: Any) -> None:
        super().__init__()
        self._compiled = compiled
        self._weight = norm.weight.detach()
        self._eps = float(norm.variance_epsilon)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return _normalised(self._compiled, hidden_states[0], self._weight, self._eps)[None]


def fuse_layers(
    model: PreTrainedModel, shapes: list[LayerShape], how: dict[int, Any], num_positions: int
) -> None:
    """Replace all layers if they are known; `how` each asks for attention, as the probe found."""
    compiled = kernels(model.device)
    decoder: Any = model.base_model
    layers = list(getattr(decoder, "layers", ()))
    if compiled is None or len(layers) != len(shapes):
        return
    if not all(is_known(layer, shapes) for layer in layers) or not _rotates_by_position(decoder):
        return
    for place, layer in enumerate(layers):
        decoder.layers[place] = FusedLayer(layer, shapes[place], how[place])
    like = decoder.layers[0].norms[0][0]
    decoder.rotary_emb = Rotary(decoder.rotary_emb, like, num_positions)
    decoder.norm = Norm(decoder.norm, compiled)


def _rotates_by_position(decoder: Any) -> bool:
    return getattr(getattr(decoder, "rotary_emb", None), "rope_type", "") in _ROPE_TYPES


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
