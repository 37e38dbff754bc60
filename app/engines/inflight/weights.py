"""Weights laid out once as the processor's matrix product wants them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from app.engines.inflight.library import LANES, products

_TYPICAL_ROWS: Final = 64
"""oneDNN's layout depends on how many rows a product has; it stays right for any number."""

_MULTIPLY: Final = {torch.bfloat16: "multiply_bfloat16", torch.float32: "multiply_float32"}

_WIDE: Final = 32
"""Outputs of one panel. layer.cpp says the same."""


class Product(ctypes.Structure):
    """`Product` of layer.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "scale")),
        *((name, ctypes.c_int32) for name in ("inputs", "outputs")),
    )


class PackedLinear(nn.Module):
    """A linear layer whose weight oneDNN would otherwise lay out anew in every call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.num_weights = linear.in_features, linear.weight.numel()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _TYPICAL_ROWS)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


class NativeLinear(nn.Module):
    """A linear layer through our own product; weight [outputs, inputs] and bias in bfloat16 or
    float32.

    With `int8` the weight is rounded to that, with a scale for each output, and each row of the
    input, too, when it comes.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, int8: bool = False) -> None:
        super().__init__()
        compiled = products()
        assert compiled is not None
        self._multiply: Callable[..., None] = getattr(compiled, _MULTIPLY[weight.dtype])
        self.out_features, self.in_features = weight.shape
        self._bias = None if bias is None else bias.detach().contiguous()
        self._scale: Tensor | None = None
        if int8:
            rounded, self._scale = _rounded(_padded(weight.detach()))
            self._panels = _panels(rounded, 4)
        else:
            self._panels = _panels(_padded(weight.detach()), 4 // weight.itemsize)
        self.product = Product(
            self._panels.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            None if self._scale is None else self._scale.data_ptr(),
            self.in_features,
            self.out_features,
        )

    @property
    def nbytes(self) -> int:
        """Of the weights that a product reads."""
        return self._panels.nbytes

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.out_features)
        if rows := x.numel() // self.in_features:  # none: a step of prompts that go on in the next
            self._multiply(
                ctypes.byref(self.product),
                ctypes.c_void_p(x.data_ptr()),
                ctypes.c_void_p(out.data_ptr()),
                rows,
            )
        return out


def _padded(weight: Tensor) -> Tensor:
    """Whole panels: filled up with zeros."""
    outputs, inputs = weight.shape
    room = weight.new_zeros(-(-outputs // _WIDE) * _WIDE, inputs)
    room[:outputs] = weight
    return room


def _rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[outputs, inputs] in uint8, 128 more than what is meant, and the scale of each output."""
    exact = weight.float()
    scale = exact.abs().amax(1).clamp(min=torch.finfo(exact.dtype).tiny) / 127
    return ((exact / scale[:, None]).round() + 128).to(torch.uint8), scale


def _panels(weight: Tensor, together: int) -> Tensor:
    """[outputs, inputs] → [panel, inputs / together, _WIDE, together]"""
    inputs = weight.shape[1]
    return weight.view(-1, _WIDE, inputs // together, together).transpose(1, 2).contiguous()


def pack_linears(model: nn.Module, *, int8: bool = False) -> None:
    """Replace every linear layer on a CPU whose product is faster so: in bfloat16, and in float32
    on processors without AVX-512, where torch's own takes half as long again in a decoder's steps.
    A layer whose inputs are no whole vectors is not rounded to int8."""
    kinds = _packed_by_onednn()
    for module in list(model.modules()):
        child: Any
        for name, child in module.named_children():
            if (
                is_cpu_linear(child, torch.bfloat16)
                and products() is not None
                and child.in_features % 2 == 0
            ):
                rounds = int8 and child.in_features % LANES == 0
                setattr(module, name, NativeLinear(child.weight, child.bias, int8=rounds))
            elif any(is_cpu_linear(child, dtype) for dtype in kinds):
                setattr(module, name, PackedLinear(child))


def _packed_by_onednn() -> set[torch.dtype]:
    """Types whose products oneDNN does faster with weights in a layout of its own."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return set()
    found = torch.cpu.get_capabilities()
    has_gain = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float32: found.get("avx2") and not found.get("avx512_f"),
    }
    return {dtype for dtype, gains in has_gain.items() if gains}


def is_cpu_linear(module: nn.Module, dtype: torch.dtype) -> bool:
    """On a CPU, of this type, and plain: a subclass may do more."""
    return (
        type(module) is nn.Linear
        and module.weight.dtype is dtype
        and module.weight.device.type == "cpu"
    )
