"""Encoder layers as one call of our kernels each.

As with decoders (`inflight.fused`) layers are replaced by their class: what those named below
compute has been read. The whole model is tried with them before it serves (`packing`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from app.engines.inflight.cache import LayerShape
from app.engines.inflight.fused import FusedLayer, Parts, activation_of
from app.engines.inflight.library import LANES

_MARGIN: Final = 128
"""Places beyond a text's end for which the kernel may read a bias: those of a whole span."""


@dataclass(frozen=True, slots=True)
class Known:
    """A layer that the kernel can compute."""

    parts: Parts
    shape: LayerShape
    scale: float
    window: int = 0  #: places that a token sees on either side, itself included; 0 for all
    in_tuple: bool = False  #: whether the layer answers with a tuple


def known(layer: Any) -> Known | None:
    """How the kernel computes this layer; None if it is not known or does not fit."""
    kind = type(layer)
    read = _KNOWN.get(f"{kind.__module__}.{kind.__qualname__}")
    if read is None:
        return None
    try:
        found = read(layer)
    except (AttributeError, ValueError):
        return None
    dtype, whole = found.parts.mixed.weight.dtype, LANES * (1 + found.parts.rotates)
    fits = dtype in (torch.float32, torch.bfloat16) and found.shape.dim % whole == 0
    return found if fits and found.parts.fits(dtype) else None


def fuse(found: Known, bias: Tensor | None, *, int8: bool = False) -> FusedLayer:
    """`bias` as `position_bias` gives it."""
    how = {"scale": found.scale, "window": found.window, "softcap": 0.0}
    fused = FusedLayer(0, found.parts, found.shape, how, found.shape.dim, int8=int8)
    if bias is not None:
        fused.add_bias(bias)
    return fused


def position_bias(model: Any, longest: int) -> Tensor | None:
    """What a model adds to scores by the distance of two tokens, [heads, 2 * reach] by reach +
    place - own, for texts of up to so many tokens; None if it adds nothing."""
    for module in model.modules():
        if type(module) is MPNetEncoder:
            encoder: Any = module
            reach = longest + _MARGIN
            buckets = encoder.relative_position_bucket(torch.arange(-reach, reach))
            bias: Tensor = encoder.relative_attention_bias(buckets)
            return bias.detach().float().T.contiguous()
    return None


def _bert(layer: Any) -> Known:
    attn = layer.attention.self
    if layer.is_decoder or hasattr(layer, "crossattention"):
        raise ValueError("it decodes")
    around = layer.attention.output.LayerNorm, layer.output.LayerNorm
    return _known(
        [attn.query, attn.key, attn.value],
        layer.attention.output.dense,
        layer,
        attn.num_attention_heads,
        {"attention_sum": around[0], "mlp_sum": around[1]},
    )


def _megatron(layer: Any) -> Known:
    attn = layer.attention.self
    if layer.is_decoder or hasattr(layer, "crossattention"):
        raise ValueError("it decodes")
    return _known(
        [attn.query, attn.key, attn.value],
        layer.attention.output.dense,
        layer,
        attn.num_attention_heads,
        {"before_attention": layer.attention.ln, "before_mlp": layer.ln},
        in_tuple=True,
    )


def _mpnet(layer: Any) -> Known:
    attn = layer.attention.attn
    return _known(
        [attn.q, attn.k, attn.v],
        attn.o,
        layer,
        attn.num_attention_heads,
        {"attention_sum": layer.attention.LayerNorm, "mlp_sum": layer.output.LayerNorm},
        in_tuple=True,
    )


def _known(
    projections: list[nn.Linear],
    mixed: nn.Linear,
    layer: Any,
    heads: int,
    norms: dict[str, Any],
    *,
    in_tuple: bool = False,
) -> Known:
    """What these have in common: a feed-forward part as BERT's."""
    dim = mixed.in_features // heads
    parts = Parts(
        projections=projections,
        mixed=mixed,
        gates=[layer.intermediate.dense],
        down=layer.output.dense,
        activation=activation_of(layer.intermediate.intermediate_act_fn),
        is_gated=False,
        norms=_no_norms() | norms,
        rotates=False,
    )
    return Known(parts, LayerShape(heads, dim), dim**-0.5, in_tuple=in_tuple)


def _distilbert(layer: Any) -> Known:
    attn, ffn = layer.attention, layer.ffn
    dim = attn.attention_head_size
    parts = Parts(
        projections=[attn.q_lin, attn.k_lin, attn.v_lin],
        mixed=attn.out_lin,
        gates=[ffn.lin1],
        down=ffn.lin2,
        activation=activation_of(ffn.activation),
        is_gated=False,
        norms=_no_norms()
        | {"attention_sum": layer.sa_layer_norm, "mlp_sum": layer.output_layer_norm},
        rotates=False,
    )
    return Known(parts, LayerShape(attn.n_heads, dim), dim**-0.5)


def _modernbert(layer: Any) -> Known:
    attn, mlp = layer.attn, layer.mlp
    parts = Parts(
        projections=[attn.Wqkv],
        mixed=attn.Wo,
        gates=[mlp.Wi],
        down=mlp.Wo,
        activation=activation_of(mlp.act),
        is_gated=True,
        norms=_no_norms()
        | {
            "before_attention": None if type(layer.attn_norm) is nn.Identity else layer.attn_norm,
            "before_mlp": layer.mlp_norm,
        },
    )
    heads = attn.Wo.in_features // attn.head_dim
    shape = LayerShape(heads, attn.head_dim)
    return Known(parts, shape, attn.head_dim**-0.5, window=attn.sliding_window or 0)


def _nomic(layer: Any) -> Known:
    found = _eurobert(layer)
    norms = {
        "attention_sum": layer.post_attention_layernorm,
        "mlp_sum": layer.post_mlp_layernorm,
    }
    found.parts.norms.update(_no_norms() | norms)
    return found


def _eurobert(layer: Any) -> Known:
    attn = layer.self_attn
    shape = LayerShape(attn.k_proj.out_features // attn.head_dim, attn.head_dim)
    return Known(Parts.of(layer), shape, attn.scaling)


def _no_norms() -> dict[str, Any]:
    return dict.fromkeys(("before_attention", "before_mlp", "query", "key"))


_KNOWN: Final[dict[str, Callable[[Any], Known]]] = {
    f"transformers.models.{module}.modeling_{module}.{name}": read
    for read, names in {
        _bert: {
            **{name: name.lower() for name in ("Bert", "Roberta", "Camembert", "Electra", "Ernie")},
            "XLMRoberta": "xlm_roberta",
        },
        _megatron: {"MegatronBert": "megatron_bert"},
        _mpnet: {"MPNet": "mpnet"},
        _nomic: {"NomicBert": "nomic_bert"},
    }.items()
    for name, module in ((f"{name}Layer", module) for name, module in names.items())
} | {
    "transformers.models.data2vec.modeling_data2vec_text.Data2VecTextLayer": _bert,
    "transformers.models.distilbert.modeling_distilbert.TransformerBlock": _distilbert,
    "transformers.models.modernbert.modeling_modernbert.ModernBertEncoderLayer": _modernbert,
    "transformers.models.eurobert.modeling_eurobert.EuroBertDecoderLayer": _eurobert,
}
"""By the class of the layer, how it is read. Dropout does nothing in any of them, and attention is
scaled by the root of a head's size, but where they say another number."""
