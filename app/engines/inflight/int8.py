"""Linear layers on a device whose weights take half the memory; on a CPU it is `NativeLinear`."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

_PART: Final = {"cpu": 2**20, "cuda": 2**26}
"""Weights that are converted at once: what a CPU's cache holds, or memory is there for."""


class Int8Linear(nn.Module):
    """A linear layer whose weight is kept as int8, with a scale for each output.

    Only the weights are rounded: products are those of the input's own type, to which the weights
    are converted part by part.
    """

    weight: Tensor  #: [outputs, inputs] int8
    scale: Tensor  #: [outputs] in the model's type

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        exact = linear.weight.detach()
        largest = exact.abs().amax(1).clamp(min=torch.finfo(exact.dtype).tiny)
        self.register_buffer("scale", largest / 127)
        rounded = (exact.float() / self.scale.float()[:, None]).round()
        self.register_buffer("weight", rounded.clamp(-127, 127).to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.weight, max(1, _PART[x.device.type] // self.weight.shape[1]))
        y = torch.cat([functional.linear(x, part.to(x.dtype)) for part in parts], -1) * self.scale
        return y if self.bias is None else y + self.bias


def to_int8(model: nn.Module) -> None:
    """Replace every linear layer."""
    for module in list(model.modules()):
        child: Any
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(child))
