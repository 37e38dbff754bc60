"""The KV cache: fixed tensors, cut into blocks of tokens, written in place and never moved."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

BLOCK: Final = 32
"""Tokens of one block. attention.cpp says the same."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token: a key and a value for each of its key heads."""

    kv_heads: int
    dim: int
    group: int = 1  #: query heads of each key head

    def block_bytes(self, dtype: torch.dtype) -> int:
        return 2 * self.kv_heads * self.dim * BLOCK * dtype.itemsize


class KVCache:
    """Keys [block, head, dim, place] and values [block, head, place, dim] of every layer.

    Keys lie transposed, so that both products of attention run along contiguous memory; inside a
    block, the kernel for bfloat16 has an order of its own (attention_bfloat16.cpp). With `paged`
    both are [block, place, head, dim] instead: what the kernels of `paged` read.
    """

    def __init__(
        self,
        layers: Seq[LayerShape],
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        paged: bool = False,
    ) -> None:
        self.scrap = num_blocks  #: one block more, for what nobody reads

        def room(*shape: int) -> Tensor:
            return torch.empty(num_blocks + 1, *shape, dtype=dtype, device=device)

        self._wholes: list[Tensor]  # [parts, block, ...] of all keys and values, to be copied
        if paged and len(set(layers)) == 1:
            shape = BLOCK, layers[0].kv_heads, layers[0].dim
            whole = torch.empty(2 * len(layers), num_blocks + 1, *shape, dtype=dtype, device=device)
            self._wholes = [whole]
            self.keys, self.values = list(whole[: len(layers)]), list(whole[len(layers) :])
            return
        if paged:
            self.keys = [room(BLOCK, layer.kv_heads, layer.dim) for layer in layers]
            self.values = [room(BLOCK, layer.kv_heads, layer.dim) for layer in layers]
        else:
            self.keys = [room(layer.kv_heads, layer.dim, BLOCK) for layer in layers]
            self.values = [room(layer.kv_heads, BLOCK, layer.dim) for layer in layers]
        self._wholes = [part[None] for part in (*self.keys, *self.values)]

    def copy(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to); all are read before any is written."""
        device = self.keys[0].device
        # From pinned memory, or the host would wait for the step under way.
        blocks = torch.tensor(pairs, pin_memory=device.type == "cuda")
        source, target = blocks.to(device, non_blocking=True).unbind(1)
        for whole in self._wholes:
            whole[:, target] = whole[:, source]


def blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK)
