"""Drawing the next tokens on the device, without a look at any value from the host.

What a row draws is a function of its logits, its limits and its key alone, whatever its company: an
exponential race, in which each token's time is a hash of (key, token) over its weight. Limits are
applied as `sampling` does: temperature, min_p, top_k, top_p; tokens as likely as the last one
within top_k are within it too.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from app.engines.inflight import staging
from app.engines.inflight.paged import kernels
from app.engines.sampling.sampler import BAD_ROW

_PART: Final = 4096
"""Logits that one program looks through for the likeliest."""

_BLOCK: Final = 4096
_32: Final = 0xFFFFFFFF


def draw(logits: Tensor, samples: Tensor, last: Tensor) -> Tensor:
    """A token for each row, BAD_ROW where the logits are no numbers: [rows, width] → [rows] int64.

    `samples` are those of `staging.Views`. The tokens are also written into `last` [slots] int64.
    """
    compiled = kernels(logits.device)
    if compiled is not None:
        return _launch(compiled, logits, samples, last)
    tokens = _draw(logits, samples)
    last[samples[staging.SAMPLE_ROW, : len(tokens)].long()] = tokens.clamp(min=0)
    return tokens


def _launch(compiled: Any, logits: Tensor, samples: Tensor, last: Tensor) -> Tensor:
    logits = logits.contiguous()
    rows, width = logits.shape
    parts = -(-width // _PART)
    tops = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    compiled.largest_of_parts[(rows, parts)](
        logits, tops, ids, width, parts, BLOCK=_PART, num_warps=8
    )
    compiled.choose[(rows,)](
        logits,
        tops,
        ids,
        samples,
        samples.stride(0),
        tokens,
        last,
        width,
        parts,
        BITS=16 if logits.dtype is torch.bfloat16 else 32,
        BLOCK_PARTS=1 << (parts - 1).bit_length(),
        BLOCK=_BLOCK,
        num_warps=16,
    )
    return tokens


def _draw(logits: Tensor, samples: Tensor) -> Tensor:
    """The same in torch operations."""
    z, line = logits.float(), samples[:, : len(logits), None]
    temperature, top_p, min_p = (
        line[place].contiguous().view(torch.float32)
        for place in (staging.TEMPERATURE, staging.TOP_P, staging.MIN_P)
    )
    greedy = temperature <= 0
    warm = torch.where(greedy, 1.0, temperature)
    top, likeliest = z.max(-1, keepdim=True)

    ordered = z.sort(-1, descending=True).values
    last = (line[staging.TOP_K].long().clamp(max=z.shape[1]) - 1).clamp(min=0)
    by_rank = torch.where(line[staging.TOP_K] > 0, ordered.gather(1, last), float("-inf"))
    lowest = torch.maximum(by_rank, top + warm * min_p.log())
    weights = torch.where(ordered >= lowest, ((ordered - top) / warm).exp(), 0.0)
    before = weights.cumsum(-1) - weights
    inside = (before < top_p * weights.sum(-1, keepdim=True)) | (before <= 0)
    nucleus = torch.where(inside & (weights > 0), ordered, float("inf")).amin(-1, keepdim=True)
    lowest = torch.where(top_p < 1, torch.maximum(lowest, nucleus), lowest).minimum(top)

    time = _times(line[staging.LOW_KEY], line[staging.HIGH_KEY], z.shape[1])
    score = torch.where(z >= lowest, (z - top) / warm - time.log(), float("-inf"))
    tokens = torch.where(greedy, likeliest, score.argmax(-1, keepdim=True))
    return torch.where(torch.isfinite(top), tokens, BAD_ROW)[:, 0]


def _times(low_key: Tensor, high_key: Tensor, width: int) -> Tensor:
    """Exponential times of every token: keys [rows, 1] int32 → [rows, width] float32."""
    places = torch.arange(width, device=low_key.device)
    noise = _mixed_bits((places * 0x9E3779B1 & _32) ^ (low_key.long() & _32))
    noise = _mixed_bits((noise + (high_key.long() & _32)) & _32)
    u = (noise.float() + 0.5) * 2.0**-32
    return torch.where(u < 0.001, u * (1 + u * (0.5 + u * 0.33333334)), -torch.log(1 - u))


def _mixed_bits(x: Tensor) -> Tensor:
    """32 bits in int64."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & _32
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & _32
    return x ^ (x >> 16)
