"""Texts without padding: the layers of a model see one row of packed tokens.

A batch goes into the model as rows, padded to the longest, and so comes out: its embeddings, its
pooler and its head do what they always do. In between, the first layer is handed the tokens of all
texts one behind the other, and what the last one gives is laid out in rows again. Attention, which
alone minds where a text ends, is our kernel's; a layer of a known class is one call of it
(`layers`). Which modules are the layers is guessed: whoever packs a model has to try it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from app.engines.encoder import layers
from app.engines.inflight import native
from app.engines.inflight.attention import Packed
from app.engines.inflight.cache import BLOCK, KVCache, LayerShape
from app.engines.inflight.library import products
from app.engines.inflight.native import NativeKernel, NativeStep
from app.engines.inflight.weights import pack_linears

NAME: Final = "gristmill_packed"
"""Under this name transformers finds our attention; without a mask function beside it, it makes
none."""

_WITHOUT_EFFECT: Final = {
    *("dropout", "is_causal", "position_ids", "position_embeddings", "cache_position"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "deterministic"),
}
"""What models hand on to attention besides, and what changes nothing here."""

_running = threading.local()
"""`company` of the thread's latest pass: transformers hands attention nothing of ours."""


class Unpackable(Exception):
    """Why a model cannot be packed, in a few words."""


class Rooms:
    """Where keys and values of one pass lie, layer after layer in the same place."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._kernels: dict[LayerShape, NativeKernel] = {}

    def kernel(self, shape: LayerShape, num_blocks: int) -> NativeKernel:
        kernel = self._kernels.get(shape)
        if kernel is None or kernel.cache.scrap < num_blocks:
            cache = KVCache([shape], num_blocks, self._dtype, self._device)
            kernel = native.load(cache)
            if kernel is None:
                raise Unpackable(f"no kernel for heads of {shape.dim} numbers in {self._dtype}")
            self._kernels[shape] = kernel
        return kernel


class Company:
    """The texts of one pass: rows of the model's inputs, and one row of packed tokens."""

    def __init__(self, lengths: Seq[int], rooms: Rooms) -> None:
        self._rooms = rooms
        self._lengths = np.array(lengths, np.int32)
        firsts = np.cumsum(self._lengths) - self._lengths
        positions = np.arange(self._lengths.sum()) - np.repeat(firsts, self._lengths)
        rows = np.repeat(np.arange(len(lengths)), self._lengths)
        self.shape = len(lengths), int(self._lengths.max())
        self._places = torch.from_numpy(rows * self.shape[1] + positions)
        self._positions = torch.from_numpy(positions)
        blocks = -(-self._lengths // BLOCK)
        starts = np.cumsum(blocks) - blocks
        self._num_blocks = int(blocks.sum())
        self._tables = (starts[:, None] + np.arange(blocks.max())).astype(np.int32)
        self._packed = Packed(
            token_ids=positions,  # nobody reads them
            positions=positions,
            slots=starts[rows].astype(np.int64) * BLOCK + positions,
            segments=np.stack(
                [np.arange(len(lengths)), firsts, self._lengths, np.zeros_like(firsts)], axis=1
            ).astype(np.int32),
            ends=firsts + self._lengths - 1,
        )
        self._steps: dict[tuple[LayerShape, bool], NativeStep] = {}

    def step(self, given: tuple[int, int], shape: LayerShape, *, causal: bool) -> NativeStep:
        """Attention among these texts, to earlier tokens alone or to all; `given` are the rows and
        tokens that it is for. Raises `Unpackable` if they are others than were packed."""
        if given != (1, len(self._places)):
            raise Unpackable("its layers are handed something else")
        found = self._steps.get((shape, causal))
        if found is None:
            kernel = self._rooms.kernel(shape, self._num_blocks)
            lengths = None if causal else self._lengths
            found = NativeStep(kernel, self._packed, self._tables, lengths)
            self._steps[shape, causal] = found
        return found

    def pack(self, given: Any) -> Any:
        """[rows or 1, width, ...] → [1, tokens, ...]; whatever is no such tensor stays."""
        if isinstance(given, tuple):
            return tuple(map(self.pack, given))
        rows, width = self.shape
        if not isinstance(given, Tensor) or given.dim() < 2 or given.shape[1] != width:
            return given
        if given.shape[0] == 1:
            return given[:, self._positions]
        return given.flatten(0, 1)[None, self._places] if given.shape[0] == rows else given

    def unpack(self, given: Any) -> Any:
        """The other way round; of a tuple the first. Padded places are 0."""
        if isinstance(given, tuple):
            return self.unpack(given[0]), *given[1:]
        rows, width = self.shape
        out = given.new_zeros(rows * width, given.shape[-1])
        out[self._places] = given[0]
        return out.view(rows, width, -1)


class Packing:
    """A model whose layers are packed."""

    def __init__(self, model: Any, longest: int, *, whole: bool) -> None:
        """Changes the model, for texts of up to so many tokens: with `whole` its layers are our
        kernel's, else only their attention is. Raises `Unpackable`."""
        self._model = model
        self._name, self._layers = _layers_of(model)
        self._attention = model.config._attn_implementation
        self._rooms = Rooms(model.dtype, model.device)
        self.whole = whole
        known = [layers.known(each) for each in self._layers]
        if whole and products() is None:
            raise Unpackable("this processor has no products that are ours")
        if whole and not all(known):
            raise Unpackable("its layers are not known")
        bias = layers.position_bias(model, longest) if whole else None
        last = len(self._layers) - 1
        packed = [
            _PackedLayer(
                _KernelLayer(found, bias) if whole and found is not None else layer,
                layer,
                is_first=place == 0,
                is_last=place == last,
            )
            for place, (layer, found) in enumerate(zip(self._layers, known, strict=True))
        ]
        try:
            model.set_attn_implementation(NAME)
        except (ValueError, ImportError) as error:
            if not whole:  # else nobody asks for it, and masks are made in vain
                raise Unpackable("its attention is its own") from error
        model.set_submodule(self._name, nn.ModuleList(packed))

    @contextmanager
    def company(self, lengths: Seq[int]) -> Iterator[None]:
        """In here the model runs texts of these lengths."""
        _running.company = Company(lengths, self._rooms)
        try:
            yield
        finally:
            del _running.company

    def undo(self) -> None:
        self._model.set_submodule(self._name, self._layers)
        self._model.set_attn_implementation(self._attention)

    def keep(self) -> None:
        """From now on for good: what is no longer needed is given up, and what is, made faster."""
        self._layers = nn.ModuleList()
        pack_linears(self._model)


class _PackedLayer(nn.Module):
    """One of the layers, in the model's own list of them."""

    def __init__(self, runs: nn.Module, instead_of: Any, *, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.runs, self._is_first, self._is_last = runs, is_first, is_last
        if hasattr(instead_of, "attention_type"):  # by which some models choose what to hand in
            self.attention_type = instead_of.attention_type

    def forward(self, hidden_states: Tensor, *others: Any, **named: Any) -> Any:
        company: Company = _running.company
        x = company.pack(hidden_states) if self._is_first else hidden_states
        others, named = company.pack(others), {key: company.pack(named[key]) for key in named}
        out = self.runs(x, *others, **named)
        return company.unpack(out) if self._is_last else out


class _KernelLayer(nn.Module):
    """A layer as one call of our kernel."""

    def __init__(self, found: layers.Known, bias: Tensor | None) -> None:
        super().__init__()
        self._shape, self._in_tuple = found.shape, found.in_tuple
        self._turns = found.parts.rotates
        self._fused = layers.fuse(found, bias)

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Any:
        company: Company = _running.company
        step = company.step((x.shape[0], x.shape[1]), self._shape, causal=False)
        out = self._fused.run(step, x, *(named["position_embeddings"] if self._turns else ()))
        return (out,) if self._in_tuple else out


def _attend(
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
    strange = {name for name in others if others[name] is not None and others[name] is not False}
    if strange - _WITHOUT_EFFECT or attention_mask is not None:
        raise Unpackable("it asks of attention what the kernel does not do")
    if query.shape[-1] != value.shape[-1] or query.shape[2] != key.shape[2]:
        raise Unpackable("its queries, keys and values differ in size")
    causal = others.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    company: Company = _running.company
    shape = LayerShape(key.shape[1], key.shape[-1])
    out = company.step((key.shape[0], key.shape[2]), shape, causal=causal).attend(
        0,
        query[0],
        key[0],
        value[0],
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or 0,
        softcap=softcap or 0.0,
        sinks=s_aux,
    )
    return out[None], None


AttentionInterface.register(NAME, _attend)


def _layers_of(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of modules that holds the most weights, and its name. Raises `Unpackable`."""
    lists = {name: each for name, each in model.named_modules() if type(each) is nn.ModuleList}
    if not lists:
        raise Unpackable("it has no list of layers")
    name = max(lists, key=lambda each: sum(part.numel() for part in lists[each].parameters()))
    return name, lists[name]
