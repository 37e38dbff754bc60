"""Drawing a token from weights, row by row: functions of tensors, without state.

What a row draws depends on its weights, its seed and its position alone: the noise is a hash of
(seed, position), not the state of a generator that the rows share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

_BLOCK: Final = 256  # torch searches an index along a row slowly; maxima of blocks come first


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """Noise in [0, 1) with 53 bits: a function of (seed, position), both [n] int64 → [n] float64.

    SplitMix64, once over the seed and once over the position, so that neighbouring seeds and
    positions have nothing in common. int64 products wrap as unsigned ones would.
    """
    mixed = _mix(_mix(seed) + position * _GOLDEN)
    return _shift(mixed, 11).double() * 2.0**-53


_GOLDEN: Final = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number


def _mix(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; torch's own shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def draw_in_nucleus(weights: Tensor, top_p: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """Draw within top_p: weights [rows, vocab], top_p [rows, 1] → [rows].

    By rejection, because to sort a vocabulary costs more than the model's step: a token drawn from
    all is in the nucleus if the tokens likelier than it hold less than top_p, which is so with
    probability top_p or more. If it is not, neither is anything as unlikely, and the next draw is
    from what is left. The likeliest token is always inside, also where top_p is 0 in float32.
    """
    needed = top_p * weights.sum(-1, keepdim=True)
    tokens = torch.empty_like(seed)
    left = torch.arange(len(weights), device=weights.device)
    attempt = 0
    while len(left):
        noise = uniform(seed[left], position[left] + (attempt << 32))
        drawn = inverse_cdf(weights, noise)
        tokens[left] = drawn
        likelier = weights * (weights > weights.gather(1, drawn[:, None]))
        mass = likelier.sum(-1, keepdim=True)
        outside = ((mass >= needed[left]) & (mass > 0))[:, 0]
        weights, left = likelier[outside], left[outside]
        attempt += 1
    return tokens


def draw_in_top_k(weights: Tensor, top_k: Tensor, top_p: Tensor, noise: Tensor) -> Tensor:
    """Draw a place among weights in falling order, [rows, at least top_k]; top_p within top_k."""
    ranks = torch.arange(weights.shape[1], device=weights.device)
    weights = weights * (ranks < top_k[:, None])
    mass = weights.cumsum(-1)
    kept = weights * ((mass - weights < top_p * mass[:, -1:]) | (ranks == 0))
    return inverse_cdf(kept, noise)


def rows(values: Tensor, at: Tensor) -> Tensor:
    """Some rows of a table, without a copy if it is all of them."""
    return values if len(at) == len(values) else values[at]


def largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each row and its first place: [rows, n] → ([rows], [rows]). NaN is the largest."""
    top, block = _by_block(values, torch.amax).max(-1)
    members, first = _members(values, block, float("-inf"))
    return top, first + members.argmax(-1)


def inverse_cdf(weights: Tensor, noise: Tensor) -> Tensor:
    """Draw a place by weight: weights [rows, n] ≥ 0, noise [rows] in [0, 1) → [rows].

    First a block, then a place within it, in float64: a running sum over the whole row would be
    slow in float64 and would lose rare tokens in float32. A weight of 0 is never drawn.
    """
    blocks = _by_block(weights, torch.sum).double()
    cdf = blocks.cumsum(-1)
    target = noise[:, None] * cdf[:, -1:]
    block = torch.searchsorted(cdf, target, right=True).clamp_(max=cdf.shape[1] - 1)
    into = (target - (cdf - blocks).gather(1, block)) / blocks.gather(1, block)
    members, first = _members(weights, block[:, 0], 0.0)
    inside = members.double().cumsum(-1)
    place = torch.searchsorted(inside, into.clamp(0, 1 - 2.0**-53) * inside[:, -1:], right=True)
    # Only a row that is not finite gets past its end; it fails for that anyway.
    return (first + place[:, 0]).clamp_(max=weights.shape[1] - 1)


def _by_block(values: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """Reduce each block of a row to one number; the last block may be short."""
    whole = values.shape[1] // _BLOCK
    blocks = reduce(values[:, : whole * _BLOCK].view(len(values), whole, _BLOCK), dim=-1)
    rest = values[:, whole * _BLOCK :]
    if not rest.numel():
        return blocks
    return torch.cat([blocks, reduce(rest, dim=-1, keepdim=True)], dim=1)


def _members(values: Tensor, block: Tensor, beyond: float) -> tuple[Tensor, Tensor]:
    """One block of each row, [rows, _BLOCK], filled up with `beyond`, and its start, [rows]."""
    first = block * _BLOCK
    places = first[:, None] + torch.arange(_BLOCK, device=values.device)
    last = values.shape[1] - 1
    members = values.gather(1, places.clamp(max=last))
    return torch.where(places <= last, members, beyond), first
