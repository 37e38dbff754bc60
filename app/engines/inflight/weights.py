"""Weights laid out once as the processor's matrix product wants them."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

_TYPICAL_ROWS: Final = 64
"""The layout depends on how many rows a product has; it stays right for any number."""


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


def pack_linears(model: nn.Module) -> None:
    """Replace every bfloat16 linear layer on a CPU; others have nothing to gain."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if (
                type(child) is nn.Linear
                and child.weight.dtype is torch.bfloat16
                and child.weight.device.type == "cpu"
            ):
                setattr(module, name, PackedLinear(child))
