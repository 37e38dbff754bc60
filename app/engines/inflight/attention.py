"""Attention of packed tokens over the block cache, called by transformers' own model code.

The model runs on one row of packed tokens, [1, tokens], with no mask and no cache of its own. Each
layer calls `attend`, which keeps the new keys and values in our cache and lets every token look at
the blocks of its own sequence. `BlockStep` says which those are. On CPUs the work is done by
`native`, where it can be compiled; `PortableStep` is the same in torch operations.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from app.engines.inflight.cache import BLOCK, KVCache, LayerShape, blocks_for
from app.engines.inflight.scheduler import Segment

NAME: Final = "gristmill"
"""Under this name transformers finds our attention; without a mask function beside it, it makes
none."""

STEP: Final = "gristmill_step"
"""The keyword argument that carries the step through the model to `attend`."""

_running = threading.local()
"""The same for models that do not hand it on: `step` of the thread's latest `run`."""

_SCORES: Final = 2**21
"""Most scores that are computed at once, for each head: they are held in float32, several times."""

_WITHOUT_EFFECT: Final = {
    *("dropout", "is_causal", "position_ids", "position_embeddings", "cache_position"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict"),
}
"""What models hand on besides, and what changes nothing here."""


class Step(Protocol):
    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int,
        softcap: float,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """query [heads, tokens, dim], key and value [kv_heads, tokens, dim] → [tokens, heads, dim].

        `window` is how many tokens back a token sees, itself included, 0 for all; `softcap` bounds
        the scores, 0 for none; `sinks` [heads] are scores that take their part of the attention and
        give nothing for it (arXiv 2309.17453).
        """
        ...


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [1, heads, tokens, dim] → [1, tokens, heads, dim]."""
    step: Step = others.get(STEP, _running.step)
    if isinstance(step, ProbeStep):
        step.check(module, attention_mask, others)
    width = max(key.shape[-1], value.shape[-1])
    out = step.attend(
        module.layer_idx,  # type: ignore[arg-type]
        *(_widened(part[0], width) for part in (query, key, value)),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or 0,
        softcap=softcap or 0.0,
        **({} if s_aux is None else {"sinks": s_aux}),
    )
    return out[None, ..., : value.shape[-1]], None


def _widened(heads: Tensor, width: int) -> Tensor:
    """Filled up with zeros, which change neither scores nor sums: the cache has keys and values of
    one size, and those of latent attention differ."""
    return (
        heads
        if heads.shape[-1] == width
        else nn.functional.pad(heads, (0, width - heads.shape[-1]))
    )


AttentionInterface.register(NAME, attend)


def run(
    model: PreTrainedModel, step: Step, token_ids: Tensor, positions: Tensor, ends: Tensor
) -> Tensor:
    """Logits [samples, vocab] of the tokens at `ends`; all are [n] int64 over the packed tokens."""
    _running.step = step
    out = model(
        input_ids=token_ids[None],
        position_ids=positions[None],
        logits_to_keep=ends,
        use_cache=False,
        **{STEP: step},
    )
    logits: Tensor = out.logits[0]
    return logits


@dataclass(frozen=True, slots=True)
class Packed:
    """The tokens of a step, one after the other, and where each belongs."""

    token_ids: np.ndarray  #: [tokens] int64
    positions: np.ndarray  #: [tokens] int64, within their sequences
    slots: np.ndarray  #: [tokens] int64: block * BLOCK + place, where each is kept
    segments: np.ndarray  #: [segments, 4] int32: row of the table, first token, tokens, position
    ends: np.ndarray  #: [samples] int64: the last tokens of rows whose next token is due


def pack(segments: Seq[Segment], tables: np.ndarray) -> Packed:
    """`tables` [rows, blocks] holds the block ids of each row."""
    rows = np.array([segment.row.slot for segment in segments])
    starts = np.array([segment.start for segment in segments])
    counts = np.array([segment.count for segment in segments])
    firsts = np.cumsum(counts) - counts
    positions = np.arange(counts.sum()) + np.repeat(starts - firsts, counts)
    blocks = tables[np.repeat(rows, counts), positions // BLOCK]
    token_ids = [
        token
        for segment in segments
        for token in segment.row.tokens[segment.start : segment.start + segment.count]
    ]
    due = np.array([segment.is_last for segment in segments])
    return Packed(
        token_ids=np.array(token_ids, np.int64),
        positions=positions,
        slots=blocks.astype(np.int64) * BLOCK + positions % BLOCK,
        segments=np.stack([rows, firsts, counts, starts], axis=1).astype(np.int32),
        ends=(firsts + counts - 1)[due],
    )


@dataclass(frozen=True, slots=True)
class Group:
    """Segments of equal length that are attended to together."""

    tokens: Tensor  #: [segments, length] their tokens
    tables: Tensor  #: [segments, blocks]
    positions: Tensor  #: [segments, length]


class PortableStep:
    """Attention in plain torch operations, on any device: gathers each sequence's blocks."""

    def __init__(self, cache: KVCache, blocks: Tensor, places: Tensor, groups: Seq[Group]) -> None:
        """`blocks` and `places`, [tokens] each, say where the cache keeps each token."""
        self._cache = cache
        self._blocks = blocks
        self._places = places
        self._groups = groups

    @classmethod
    def of(cls, cache: KVCache, packed: Packed, tables: np.ndarray) -> Self:
        lengths = packed.segments[:, 2]
        parts = [
            few
            for length in np.unique(lengths)
            for part in _by_width(packed.segments[lengths == length])
            for few in _bounded(part)
        ]
        arrays = [
            *np.divmod(packed.slots, BLOCK),
            *itertools.chain(*(_group(part, tables) for part in parts)),
        ]
        blocks, places, *rest = upload(arrays, cache.keys[0].device)
        return cls(cache, blocks, places, [Group(*rest[i : i + 3]) for i in range(0, len(rest), 3)])

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int,
        softcap: float,
        sinks: Tensor | None = None,
    ) -> Tensor:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        keys[self._blocks, :, :, self._places] = key.transpose(0, 1)
        values[self._blocks, :, self._places] = value.transpose(0, 1)
        heads, num_tokens, dim = query.shape
        out = query.new_empty(num_tokens, heads, dim)
        for group in self._groups:
            rows, length = group.tokens.shape
            q = query[:, group.tokens].transpose(0, 1).reshape(rows, len(key), -1, dim)
            k = keys[group.tables].permute(0, 2, 3, 1, 4).flatten(3)  # [rows, kv, dim, places]
            v = values[group.tables].permute(0, 2, 1, 3, 4).flatten(2, 3)
            scores = (q @ k).float() * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            places = torch.arange(k.shape[-1], device=k.device)
            seen = places <= group.positions[..., None]  # [rows, length, places]
            if window:
                seen &= places > group.positions[..., None] - window
            scores = scores.view(rows, len(key), -1, length, k.shape[-1])
            scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
            weights = _weights(scores, sinks).to(v.dtype).flatten(2, 3)
            # What nobody sees may be anything, NaN too, and 0 · NaN is not 0.
            v = v.masked_fill(~seen.any(1)[:, None, :, None], 0)
            mixed = (weights @ v).view(rows, heads, length, dim)
            out[group.tokens] = mixed.transpose(1, 2)
        return out


def _weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Scores [rows, kv_heads, group, length, places] → the part that each place takes."""
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.float().view(1, scores.shape[1], -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def _by_width(segments: np.ndarray) -> list[np.ndarray]:
    """Short contexts apart from long ones, so that few blocks are gathered for nothing."""
    widths = np.log2(1 + (segments[:, 3] + segments[:, 2]) // BLOCK).astype(int)
    return [segments[widths == width] for width in np.unique(widths)]


def _bounded(segments: np.ndarray) -> Iterator[np.ndarray]:
    """Cut segments of equal length, and their number, so that a group has at most _SCORES."""
    row, first, count, start = segments.T
    places = _places(segments)
    most = max(1, _SCORES // places)
    for done in range(0, int(count[0]), most):
        length = min(most, int(count[0]) - done)
        cut = np.stack([row, first + done, np.full_like(count, length), start + done], axis=1)
        rows = max(1, _SCORES // (length * places))
        yield from (cut[place : place + rows] for place in range(0, len(cut), rows))


def _places(segments: np.ndarray) -> int:
    """What the longest context among the segments takes."""
    return BLOCK * blocks_for(int((segments[:, 2] + segments[:, 3]).max()))


def _group(segments: np.ndarray, tables: np.ndarray) -> tuple[np.ndarray, ...]:
    """The fields of `Group`."""
    steps = np.arange(segments[0, 2])
    blocks = tables[segments[:, 0], : _places(segments) // BLOCK]
    return segments[:, 1:2] + steps, blocks, segments[:, 3:4] + steps


def upload(arrays: Seq[np.ndarray], device: torch.device) -> list[Tensor]:
    """Whole numbers as int64 tensors, through one transfer for all: each waits for the device."""
    flat = np.concatenate([array.ravel() for array in arrays], dtype=np.int64)
    parts = torch.split(torch.from_numpy(flat).to(device), [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


class Asked(ValueError):
    """A layer asks of attention what `Step.attend` does not do."""


class ProbeStep:
    """Looks at what a model asks of attention, before there is a cache."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}
        self.how: dict[int, dict[str, float]] = {}  #: scale, window and softcap of each layer
        self.width = 0  #: of the logits
        self.has_sinks = False

    def check(self, module: nn.Module, mask: Tensor | None, others: dict[str, Any]) -> None:
        """Raise `Asked` for what `attend` would silently leave out."""
        given = {name for name, value in others.items() if value is not None and value is not False}
        strange = given - {STEP, *_WITHOUT_EFFECT}
        if mask is not None:
            strange.add("a mask of its own")
        if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
            strange.add("attention to later tokens")
        if strange:
            raise Asked(f"{type(module).__name__} asks for {', '.join(sorted(strange))}")

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        sinks: Tensor | None = None,
        **how: float,
    ) -> Tensor:
        self.has_sinks |= sinks is not None
        if layer in self.layers:
            raise Asked(f"its layer {layer} attends twice")
        self.layers[layer] = LayerShape(len(key), key.shape[-1], group=len(query) // len(key))
        self.how[layer] = how
        return query.transpose(0, 1).contiguous()
