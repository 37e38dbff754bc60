"""Decoder layers as calls of our kernels: one for each, or for all.

Layers are replaced by their class: what those named below compute has been read, at every position
and in every branch. What else may differ (a hook, a later version of the class) is tried: the call
has to give what the layer gave on the same tokens. Other layers stay transformers' own. Where all
are replaced, and the model hands on what each gives as it is, they become one.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from app.engines.inflight.attention import STEP, Packed, PortableStep, run
from app.engines.inflight.cache import BLOCK, KVCache, LayerShape
from app.engines.inflight.library import LANES, products
from app.engines.inflight.native import Attention, Layer, Layers, NativeKernel, NativeStep, Norm
from app.engines.inflight.weights import NativeLinear, is_cpu_linear

log = logging.getLogger(__name__)

_KNOWN: Final = {
    f"transformers.models.{module}.modeling_{module}.{name}DecoderLayer"
    for name, module in {
        **{name: name.lower() for name in ("Llama", "Mistral", "Ministral", "Qwen2", "Qwen3")},
        **{name: name.lower() for name in ("Gemma", "Gemma2", "Gemma3", "Olmo", "Olmo2", "Olmo3")},
        **{name: name.lower() for name in ("Granite", "Phi3", "SmolLM3", "Starcoder2")},
        "SeedOss": "seed_oss",
    }.items()
}
"""Each of them: norms before, behind or around attention and the feed-forward part; rotation by
cosines and sines that the model hands in, the first half of a head against the second; plain
residuals."""

_ACTIVATIONS: Final[dict[int, Callable[[Tensor], Tensor]]] = {
    1: functional.silu,
    2: lambda x: functional.gelu(x, approximate="tanh"),
    3: functional.gelu,
    4: functional.relu,
}
"""By their numbers in layer.cpp."""

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


@dataclass(frozen=True, slots=True)
class Parts:
    """What a layer of a known class is made of, by its role; None for what it does not have."""

    projections: list[nn.Linear]  #: queries, keys, values, or all in one
    mixed: nn.Linear
    gates: list[nn.Linear]  #: gate and up, or both in one; one alone if nothing is gated
    down: nn.Linear
    activation: int
    is_gated: bool
    norms: dict[str, Any]  #: by the names in `Layer`
    times: float = 1.0  #: of what is added to a residual
    rotates: bool = True

    @classmethod
    def of(cls, layer: Any) -> Parts:
        """Raises `AttributeError` for what is missing, `ValueError` for what the kernel cannot."""
        attn, mlp = layer.self_attn, layer.mlp
        act = next(getattr(mlp, name) for name in _ACTS if hasattr(mlp, name))
        return cls(
            projections=_linears(attn, "qkv_proj") or _linears(attn, "q_proj", "k_proj", "v_proj"),
            mixed=attn.o_proj,
            gates=_linears(mlp, "gate_up_proj")
            or _linears(mlp, "gate_proj", "up_proj")
            or [mlp.c_fc],
            down=mlp.down_proj if hasattr(mlp, "down_proj") else mlp.c_proj,
            activation=activation_of(act),
            is_gated=not hasattr(mlp, "c_fc"),
            norms={
                **_norms_around(layer),
                "query": getattr(attn, "q_norm", None),
                "key": getattr(attn, "k_norm", None),
            },
            times=getattr(layer, "residual_multiplier", 1.0),
            rotates=getattr(attn, "use_rope", True),
        )

    def fits(self, dtype: torch.dtype = torch.bfloat16) -> bool:
        """Whether the kernel has these types and sizes."""
        linears = [*self.projections, self.mixed, *self.gates, self.down]
        return (
            all(is_cpu_linear(each, dtype) for each in linears)
            and all(each.in_features % LANES == 0 for each in linears)
            and self.down.in_features % (2 * LANES) == 0
        )


_ACTS: Final = ("act_fn", "activation_fn", "act")


class FusedLayer(nn.Module):
    """Holds the layer's weights in the kernel's layout."""

    def __init__(
        self,
        place: int,
        parts: Parts,
        shape: LayerShape,
        how: dict[str, float],
        rotated: int,
        *,
        int8: bool = False,
    ) -> None:
        """The layer at this place of the cache; `how` it attends: scale, window, softcap."""
        super().__init__()
        linear = functools.partial(NativeLinear, int8=int8)
        self.qkv = linear(*_stacked(parts.projections))
        self.mixed = linear(parts.mixed.weight, parts.mixed.bias)
        gates = _stacked(parts.gates)
        self.gated = linear(*(_interleaved(*gates) if parts.is_gated else gates))
        self.down = linear(parts.down.weight, parts.down.bias)
        heads = self.qkv.out_features // shape.dim - 2 * shape.kv_heads
        widths = {"query": shape.dim, "key": shape.dim}
        if across := parts.norms["query"] is not None and _width(parts.norms["query"]) > shape.dim:
            widths = {"query": heads * shape.dim, "key": shape.kv_heads * shape.dim}
        self._held: list[Tensor] = []
        self.layer = Layer(
            *(part.product for part in (self.qkv, self.mixed, self.gated, self.down)),
            **{
                role: self._norm(norm, widths.get(role, self.qkv.in_features))
                for role, norm in parts.norms.items()
                if norm is not None
            },
            width=self.qkv.in_features,
            inner=self.down.in_features,
            rotated=rotated if parts.rotates else 0,
            across=across,
            activation=parts.activation,
            gates=parts.is_gated,
            place=place,
            times=parts.times,
            attention=Attention(
                heads=heads,
                kv_heads=shape.kv_heads,
                dim=shape.dim,
                window=int(how["window"]),
                scale=how["scale"],
                softcap=how["softcap"],
            ),
        )
        self._alone = Layers([self.layer])

    def forward(self, hidden_states: Tensor, **others: Any) -> Tensor:
        step: NativeStep = others[STEP]
        return self.run(step, hidden_states, *others["position_embeddings"])

    def run(
        self, step: NativeStep, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
    ) -> Tensor:
        return step.run(self._alone, x, cos, sin)

    def add_bias(self, bias: Tensor) -> None:
        """Numbers [heads, 2 * reach] float32 to add to scores, by reach + place - own."""
        self._held.append(bias)
        self.layer.attention.bias = bias.data_ptr()
        self.layer.attention.reach = bias.shape[1] // 2

    def _norm(self, norm: Any, width: int) -> Norm:
        """As the kernel takes it; the class says where numbers are rounded, and what is a gain."""
        kind = type(norm).__name__
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        gain = torch.ones(width) if weight is None else weight.detach().float().clone()
        if kind.startswith("Gemma"):
            gain += 1
        self._held.append(gain)
        if bias is not None:
            self._held.append(bias := bias.detach().float())
        centred = "LayerNorm" in kind
        return Norm(
            gain=gain.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            eps=getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", 1e-5),
            centred=centred,
            rounds=not (centred or kind.startswith(("Gemma", "Olmo"))),
        )


class FusedLayers(nn.Module):
    """All layers of a model, in the place of the first."""

    def __init__(self, layers: list[FusedLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._all = Layers([each.layer for each in layers])

    def forward(self, hidden_states: Tensor, **others: Any) -> Tensor:
        step: NativeStep = others[STEP]
        return step.run(self._all, hidden_states, *others["position_embeddings"])


def fuse_layers(model: PreTrainedModel, shapes: list[LayerShape], *, int8: bool = False) -> None:
    """Replace the layers for which that is the same, and faster; `shapes` as the probe found. With
    `int8` their weights are then rounded."""
    compiled = products()
    if model.dtype is not torch.bfloat16 or model.device.type != "cpu" or compiled is None:
        return
    if any(shape.dim % LANES for shape in shapes):  # then nothing attends through the kernel
        return
    layers = {name: each for name, each in model.named_modules() if _is_known(each)}
    if not layers:
        return
    cache = KVCache(shapes, len(_COUNTS), model.dtype, model.device)
    packed, tables = _trial()
    seen = _watch(model, layers, PortableStep.of(cache, packed, tables), packed)
    step = NativeStep(NativeKernel(compiled, cache), packed, tables)
    for name, layer in layers.items():
        place = layer.self_attn.layer_idx
        fused = _fused(layer, shapes[place], seen[place], step, int8)
        if fused is None:
            log.info("layer %d runs as transformers has it", place)
        else:
            model.set_submodule(name, fused)
    lists = {name.rpartition(".")[0] for name in layers}
    if len(lists) == 1 and len(seen) == len(shapes) and _are_chained(seen):
        _join(model, lists.pop())


def _are_chained(seen: dict[int, _Seen]) -> bool:
    """Whether each layer was handed just what the one before it gave, and all the same turns."""
    places = [seen[place] for place in range(len(seen))]
    turns = [(each.others or {}).get("position_embeddings") for each in places]
    return all(turn is turns[0] for turn in turns) and all(
        each.inputs[0] is before.output for before, each in itertools.pairwise(places)
    )


def _join(model: PreTrainedModel, name: str) -> None:
    """Put all layers of this list into its first place, if all are fused."""
    layers = [each for each in model.get_submodule(name).children() if isinstance(each, FusedLayer)]
    if len(layers) == len(list(model.get_submodule(name).children())):
        model.set_submodule(name, nn.ModuleList([FusedLayers(layers)]))


def _is_known(layer: Any) -> bool:
    kind = type(layer)
    if f"{kind.__module__}.{kind.__qualname__}" not in _KNOWN:
        return False
    return getattr(layer.self_attn.config, "clip_qkv", None) is None  # OLMo may bound them


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


def _fused(
    layer: Any, shape: LayerShape, seen: _Seen, step: NativeStep, int8: bool
) -> FusedLayer | None:
    """The replacement, if it gives what the layer gave."""
    if not isinstance(seen.output, Tensor) or seen.others is None or seen.attention is None:
        return None
    if len(seen.inputs) != 1 or "position_embeddings" not in seen.others:
        return None
    cos = seen.others["position_embeddings"][0]
    rotated = int(cos.shape[-1])
    if cos.shape[:-1] != (1, sum(_COUNTS)) or rotated % (2 * LANES) or rotated > shape.dim:
        return None
    try:
        parts = Parts.of(layer)
    except (AttributeError, StopIteration, ValueError):
        return None
    if not parts.fits():
        return None
    place = int(layer.self_attn.layer_idx)
    fused = FusedLayer(place, parts, shape, seen.attention, rotated)
    with torch.inference_mode():
        given, wanted = seen.inputs[0].float(), seen.output.float()
        got = fused(*seen.inputs, **{**seen.others, STEP: step}).float()
    off = (got - wanted).norm() / (wanted - given).norm()
    if not off < _TOLERANCE:  # NaN is not
        return None
    return FusedLayer(place, parts, shape, seen.attention, rotated, int8=True) if int8 else fused


def _linears(module: Any, *names: str) -> list[nn.Linear]:
    """All of them, or none."""
    return [getattr(module, name) for name in names] if hasattr(module, names[0]) else []


def _norms_around(layer: Any) -> dict[str, Any]:
    """`post_attention_layernorm` is behind attention, or before what comes then."""
    before = getattr(layer, "input_layernorm", None)
    between, behind = layer.post_attention_layernorm, getattr(layer, _BEHIND, None)
    if behind is None:
        return {"before_attention": before, "before_mlp": between}
    return {
        "before_attention": before,
        "after_attention": between,
        "before_mlp": getattr(layer, "pre_feedforward_layernorm", None),
        "after_mlp": behind,
    }


_BEHIND: Final = "post_feedforward_layernorm"


def activation_of(act: Any) -> int:
    """Its number in the kernel, by what it does. Raises `ValueError` if it has none."""
    x = torch.linspace(-8, 8, 101)
    for number, known in _ACTIVATIONS.items():
        if torch.allclose(act(x), known(x), atol=1e-5):
            return number
    raise ValueError("the kernel has no such activation")


def _width(norm: Any) -> int:
    return int(norm.weight.numel())


def _stacked(linears: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the outputs of all, one after the other."""
    weight = torch.cat([each.weight.detach() for each in linears])
    if all(each.bias is None for each in linears):
        return weight, None
    biases = [
        each.weight.new_zeros(each.out_features) if each.bias is None else each.bias.detach()
        for each in linears
    ]
    return weight, torch.cat(biases)


def _interleaved(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Half a panel of gates, then half a panel of the numbers they are for."""

    def mixed(rows: Tensor) -> Tensor:
        parts = [part.reshape(-1, LANES, *rows.shape[1:]) for part in rows.chunk(2)]
        return torch.stack(parts, dim=1).flatten(0, 2)

    return mixed(weight), None if bias is None else mixed(bias)
