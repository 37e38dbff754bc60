"""Decoder layers of the Llama kind as one call of our kernels each.

A layer is replaced if it is built of the modules named below and nothing else, and if the call
gives what the layer gave on the same tokens. What differs stays transformers' own.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from app.engines.inflight.attention import STEP, Packed, PortableStep, run
from app.engines.inflight.cache import BLOCK, KVCache, LayerShape
from app.engines.inflight.library import LANES, products
from app.engines.inflight.native import Attention, Decoder, NativeKernel, NativeStep
from app.engines.inflight.weights import NativeLinear, is_bfloat16_linear

log = logging.getLogger(__name__)

_PARTS: Final = {
    "": {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"},
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
"""The children of such a layer, and theirs."""

_TOLERANCE: Final = 0.02
"""Of what a layer adds to its input, in the Euclidean norm: bfloat16 has 8 bits."""

_COUNTS: Final = (20, 9)
"""Tokens of the two sequences that layers are tried on."""


@dataclass(slots=True)
class _Seen:
    """What a layer was given and gave, and how it asked for attention."""

    inputs: tuple[Any, ...] = ()
    others: dict[str, Any] | None = None
    output: Any = None
    attention: dict[str, float] | None = None


class FusedLayer(nn.Module):
    """Holds the layer's weights in the kernel's layout. Raises `ValueError` if it cannot."""

    def __init__(self, layer: Any, shape: LayerShape, how: dict[str, float]) -> None:
        super().__init__()
        attn, mlp = layer.self_attn, layer.mlp
        query, key, value = attn.q_proj, attn.k_proj, attn.v_proj
        self._layer = int(attn.layer_idx)
        self.qkv = _stacked([query, key, value])
        self.mixed = NativeLinear(attn.o_proj.weight, attn.o_proj.bias)
        self.gated = _interleaved(mlp.gate_proj, mlp.up_proj)
        self.down = NativeLinear(mlp.down_proj.weight, mlp.down_proj.bias)
        self._norms = [
            norm.weight.detach().contiguous()
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        self._decoder = Decoder(
            *(part.product for part in (self.qkv, self.mixed, self.gated, self.down)),
            *(weight.data_ptr() for weight in self._norms),
            layer.input_layernorm.variance_epsilon,
            layer.post_attention_layernorm.variance_epsilon,
            query.in_features,
            mlp.down_proj.in_features,
            Attention(
                heads=query.out_features // shape.dim,
                kv_heads=shape.kv_heads,
                dim=shape.dim,
                window=int(how["window"]),
                scale=how["scale"],
                softcap=how["softcap"],
            ),
        )

    def forward(self, hidden_states: Tensor, **others: Any) -> Tensor:
        step: NativeStep = others[STEP]
        cos, sin = others["position_embeddings"]
        return step.decode(self._layer, self._decoder, hidden_states, cos, sin)


def fuse_layers(model: PreTrainedModel, shapes: list[LayerShape]) -> None:
    """Replace the layers for which that is the same, and faster; `shapes` as the probe found."""
    compiled = products()
    if model.dtype is not torch.bfloat16 or model.device.type != "cpu" or compiled is None:
        return
    if any(shape.dim % LANES for shape in shapes):  # then nothing attends through the kernel
        return
    layers = {name: each for name, each in model.named_modules() if _is_known(each, shapes)}
    if not layers:
        return
    cache = KVCache(shapes, len(_COUNTS), model.dtype, model.device)
    packed, tables = _trial()
    seen = _watch(model, layers, PortableStep.of(cache, packed, tables), packed)
    step = NativeStep(NativeKernel(compiled, cache), packed, tables)
    for name, layer in layers.items():
        place = layer.self_attn.layer_idx
        fused = _fused(layer, shapes[place], seen[place], step)
        if fused is None:
            log.info("layer %d runs as transformers has it", place)
        else:
            model.set_submodule(name, fused)


def _is_known(layer: Any, shapes: list[LayerShape]) -> bool:
    """Whether a module is such a layer by its parts, and of sizes that the kernel can."""
    for path, names in _PARTS.items():
        part = getattr(layer, path, None) if path else layer
        if part is None or {name for name, _ in part.named_children()} != names:
            return False
        if any(True for _ in part.parameters(recurse=False)):
            return False
    attn, mlp = layer.self_attn, layer.mlp
    linears = [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj]
    linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    norms = layer.input_layernorm, layer.post_attention_layernorm
    dim = shapes[attn.layer_idx].dim
    return (
        all(is_bfloat16_linear(each) for each in linears)
        and all(hasattr(norm, "variance_epsilon") and norm.weight.ndim == 1 for norm in norms)
        and (mlp.gate_proj.bias is None and mlp.up_proj.bias is None)
        and all(each.in_features % LANES == 0 for each in linears)
        and mlp.gate_proj.out_features % LANES == 0
        and dim % (2 * LANES) == 0
    )


def _trial() -> tuple[Packed, np.ndarray]:
    """Two sequences from their beginning, and their blocks."""
    counts = np.array(_COUNTS)
    firsts = np.cumsum(counts) - counts
    positions = np.concatenate([np.arange(count) for count in counts])
    rows = np.repeat(np.arange(len(counts)), counts)
    segments = np.stack([np.arange(len(counts)), firsts, counts, np.zeros_like(counts)], axis=1)
    packed = Packed(
        token_ids=np.arange(counts.sum()),
        positions=positions,
        slots=rows * BLOCK + positions,
        segments=segments.astype(np.int32),
        ends=firsts + counts - 1,
    )
    return packed, np.arange(len(counts), dtype=np.int32)[:, None]


def _watch(
    model: PreTrainedModel, layers: dict[str, Any], portable: PortableStep, packed: Packed
) -> dict[int, _Seen]:
    """Run the model as it is, and see what goes into and comes out of the layers."""
    seen = {layer.self_attn.layer_idx: _Seen() for layer in layers.values()}

    class Watched:
        def attend(
            self, layer: int, query: Tensor, key: Tensor, value: Tensor, **how: Any
        ) -> Tensor:
            if layer in seen:
                seen[layer].attention = how
            return portable.attend(layer, query, key, value, **how)

    def note(layer: Any, inputs: Any, others: Any, output: Any) -> None:
        one = seen[layer.self_attn.layer_idx]
        one.inputs, one.others, one.output = inputs, others, output

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers.values()]
    tokens = torch.from_numpy(packed.token_ids * 997 % model.config.get_text_config().vocab_size)
    ends = torch.from_numpy(packed.ends)
    with torch.inference_mode():
        run(model, Watched(), tokens, torch.from_numpy(packed.positions), ends)
    for hook in hooks:
        hook.remove()
    return seen


def _fused(layer: Any, shape: LayerShape, seen: _Seen, step: NativeStep) -> FusedLayer | None:
    """The replacement, if it gives what the layer gave."""
    if not isinstance(seen.output, Tensor) or seen.others is None or seen.attention is None:
        return None
    if len(seen.inputs) != 1 or "position_embeddings" not in seen.others:
        return None
    cos = seen.others["position_embeddings"][0]
    if cos.dtype is not torch.bfloat16 or cos.shape != (1, sum(_COUNTS), shape.dim):
        return None
    fused = FusedLayer(layer, shape, seen.attention)
    with torch.inference_mode():
        given, wanted = seen.inputs[0].float(), seen.output.float()
        got = fused(*seen.inputs, **{**seen.others, STEP: step}).float()
    off = (got - wanted).norm() / (wanted - given).norm()
    return fused if off < _TOLERANCE else None  # NaN is not


def _stacked(linears: list[nn.Linear]) -> NativeLinear:
    """The outputs of all, one after the other."""
    weight = torch.cat([each.weight.detach() for each in linears])
    if all(each.bias is None for each in linears):
        return NativeLinear(weight, None)
    return NativeLinear(
        weight,
        torch.cat(
            [
                each.weight.new_zeros(each.out_features) if each.bias is None else each.bias
                for each in linears
            ]
        ),
    )


def _interleaved(gate: nn.Linear, up: nn.Linear) -> NativeLinear:
    """Half a panel of gates, then half a panel of the numbers they are for."""
    parts = [each.weight.detach().view(-1, LANES, each.in_features) for each in (gate, up)]
    return NativeLinear(torch.stack(parts, dim=1).flatten(0, 2), None)
