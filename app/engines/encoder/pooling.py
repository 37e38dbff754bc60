"""From the vectors of a text's tokens to its one vector, as sentence-transformers has it.

All in float32, whatever the model computes in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from app.engines.checkpoint.sentence_files import Layer, SentenceFiles
from app.errors import ConfigError

Pool = Callable[[Tensor, Tensor], Tensor]
"""(token vectors [rows, width, size], mask [rows, width] of 0 and 1) → [rows, size]."""

_ACTIVATIONS: Final[dict[str, Callable[[], nn.Module]]] = {
    each.__name__: each
    for each in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.Sigmoid, nn.SiLU, nn.LeakyReLU)
}


class Head(nn.Module):
    """Pools, and runs the layers behind the pooling but for a last Normalize, which is up to the
    request."""

    def __init__(self, files: SentenceFiles) -> None:
        super().__init__()
        self._pools = [_POOLS[name] for name in files.poolings]
        layers = list(files.layers)
        while layers and layers[-1].name in ("Normalize", "Dropout"):
            layers.pop()
        self.layers = nn.Sequential(*(_module(layer) for layer in layers))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(token vectors [rows, width, size], mask [rows, width] of 0 and 1) → [rows, size]."""
        tokens = tokens.float()
        pooled: Tensor = self.layers(torch.cat([pool(tokens, mask) for pool in self._pools], 1))
        return pooled


def _first(tokens: Tensor, mask: Tensor) -> Tensor:
    return tokens[:, 0]


def _last(tokens: Tensor, mask: Tensor) -> Tensor:
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask
    return tokens[torch.arange(len(tokens), device=mask.device), places.argmax(1)]


def _largest(tokens: Tensor, mask: Tensor) -> Tensor:
    return tokens.masked_fill(mask[:, :, None] == 0, float("-inf")).amax(1)


def _mean(tokens: Tensor, mask: Tensor) -> Tensor:
    return _weighted(tokens, mask) / mask.sum(1, keepdim=True)


def _mean_sqrt_len(tokens: Tensor, mask: Tensor) -> Tensor:
    return _weighted(tokens, mask) / mask.sum(1, keepdim=True).sqrt()


def _weighted_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Later tokens weigh more (arXiv 2202.08904)."""
    weights = torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask
    return _weighted(tokens, weights) / weights.sum(1, keepdim=True)


def _weighted(tokens: Tensor, weights: Tensor) -> Tensor:
    # A padded place may hold anything, and what is not a number stays so times zero.
    tokens = tokens.masked_fill(weights[:, :, None] == 0, 0.0)
    return (tokens * weights[:, :, None]).sum(1)


_POOLS: Final[dict[str, Pool]] = {
    "cls": _first,
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len": _mean_sqrt_len,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}


class _Normalize(nn.Module):
    def forward(self, vectors: Tensor) -> Tensor:
        return nn.functional.normalize(vectors, dim=-1)


def _module(layer: Layer) -> nn.Module:
    match layer.name:
        case "Dense":
            return _dense(layer)
        case "LayerNorm":
            norm = nn.LayerNorm(_number(layer, "dimension"))
            return _filled(nn.Sequential(), norm, layer, "norm")
        case "Normalize":
            return _Normalize()
        case _:  # Dropout drops nothing but in training
            return nn.Identity()


def _dense(layer: Layer) -> nn.Module:
    config = layer.config
    named = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = _ACTIVATIONS.get(named.rpartition(".")[2])
    if activation is None or not named.startswith("torch.nn."):
        raise ConfigError(
            f"The engine encoder has no activation {named}; it has {', '.join(_ACTIVATIONS)}."
        )
    for place in ("module_input_name", "module_output_name"):
        if config.get(place) not in (None, "sentence_embedding"):
            raise ConfigError(f"The engine encoder has no Dense whose {place} is {config[place]}.")
    linear = nn.Linear(
        _number(layer, "in_features"),
        _number(layer, "out_features"),
        bias=bool(config.get("bias", True)),
    )
    return _filled(activation(), linear, layer, "linear")


def _filled(behind: nn.Module, module: nn.Module, layer: Layer, name: str) -> nn.Module:
    """`module` with the weights of its folder, and `behind` it what has none."""
    file = layer.folder / "model.safetensors"
    if not file.is_file():
        raise ConfigError(
            f"{layer.folder.name} has no model.safetensors; pickled weights are not loaded."
        )
    stored = {key.removeprefix(f"{name}."): each for key, each in load_file(file).items()}
    try:
        module.load_state_dict(stored)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"The weights of {layer.folder.name} do not fit: {reason}") from None
    return nn.Sequential(module.float(), behind)


def _number(layer: Layer, key: str) -> int:
    value = layer.config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"The config.json of {layer.folder.name} has no usable {key}.")
    return value
