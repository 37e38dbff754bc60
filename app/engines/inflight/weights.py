"""Weights laid out once as the processor's matrix product wants them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from app.engines.inflight.library import products

_TYPICAL_ROWS: Final = 64
"""oneDNN's layout depends on how many rows a product has; it stays right for any number."""

_WIDE: Final = 32
"""Outputs of one panel. layer.cpp says the same."""


class Product(ctypes.Structure):
    """`Product` of layer.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
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
    """A linear layer through our own product; weight [outputs, inputs] and bias in bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        compiled = products()
        assert compiled is not None
        self._multiply: Callable[..., None] = compiled.multiply_bfloat16
        self.out_features, self.in_features = weight.shape
        self.num_weights = weight.numel()
        self._panels = _panels(weight.detach())
        self._bias = None if bias is None else bias.detach().contiguous()
        self.product = Product(
            self._panels.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            self.in_features,
            self.out_features,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.out_features)
        self._multiply(
            ctypes.byref(self.product),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            x.numel() // self.in_features,
        )
        return out


def _panels(weight: Tensor) -> Tensor:
    """[outputs, inputs] → [panel, inputs / 2, _WIDE, 2]; the last panel is filled up with zeros."""
    outputs, inputs = weight.shape
    room = weight.new_zeros(-(-outputs // _WIDE) * _WIDE, inputs)
    room[:outputs] = weight
    return room.view(-1, _WIDE, inputs // 2, 2).transpose(1, 2).contiguous()


def pack_linears(model: nn.Module) -> None:
    """Replace every bfloat16 linear layer on a CPU; others have nothing to gain."""
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    packs = has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for module in list(model.modules()):
        child: Any
        for name, child in module.named_children():
            if is_bfloat16_linear(child):
                native = products() is not None and child.in_features % 2 == 0
                if native:
                    setattr(module, name, NativeLinear(child.weight, child.bias))
                elif packs:
                    setattr(module, name, PackedLinear(child))


def is_bfloat16_linear(module: nn.Module) -> bool:
    """On a CPU, and plain: a subclass may do more."""
    return (
        type(module) is nn.Linear
        and module.weight.dtype is torch.bfloat16
        and module.weight.device.type == "cpu"
    )
