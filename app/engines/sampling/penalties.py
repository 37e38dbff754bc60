"""Which tokens a row has seen, for its repetition, frequency and presence penalties."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Final

import numpy as np
import torch
from torch import Tensor

_LEAST_ROOM: Final = 64


class SeenTokens:
    """The tokens of prompt and output of the slots whose rows have penalties.

    Nothing is allocated before the first such row: most batches have none, and the counts take
    4 bytes for each slot and token of the vocabulary. What a step costs is bounded by what its own
    rows have seen.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._shape = num_slots, vocab_size
        self._device = device
        self._lengths = np.zeros(num_slots, np.int64)  #: tokens known of each slot
        self._counts: Tensor | None = None  #: [slots, vocab], of each token in the output
        self._tokens = torch.zeros((num_slots, 0), dtype=torch.int64, device=device)

    def put(self, slot: int, prompt: Seq[int], output: Seq[int]) -> None:
        vocab_size = self._shape[1]
        known = [token for token in dict.fromkeys((*prompt, *output)) if token < vocab_size]
        if self._counts is None:
            self._counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        self._make_room(len(known))
        self._tokens[slot, : len(known)] = torch.tensor(known, device=self._device)
        self._lengths[slot] = len(known)
        self._counts[slot] = 0
        if output:
            put_out = torch.tensor(output, device=self._device)
            self._counts[slot] += torch.bincount(put_out, minlength=vocab_size)

    def of(self, slots: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """What the rows have seen, one after the other: the place of each token's row among
        `slots`, the token, and how often it is in the row's output, [seen] all. Some come twice."""
        assert self._counts is not None
        lengths = self._lengths[slots]
        given = torch.from_numpy(np.stack([slots, lengths, lengths.cumsum() - lengths]))
        slot, length, first = given.to(self._device)
        total = int(lengths.sum())
        row = torch.repeat_interleave(length, output_size=total)
        place = torch.arange(total, device=self._device) - first[row]
        tokens = self._tokens[slot[row], place]
        return row, tokens, self._counts[slot[row], tokens]

    def add(self, slots: np.ndarray, tokens: Tensor) -> None:
        """One more token of each row's output."""
        assert self._counts is not None
        lengths = self._lengths[slots]
        self._make_room(int(lengths.max()) + 1)
        slot, place = torch.from_numpy(np.stack([slots, lengths])).to(self._device)
        self._tokens[slot, place] = tokens
        self._counts[slot, tokens] += 1
        self._lengths[slots] += 1

    def _make_room(self, room: int) -> None:
        more = room - self._tokens.shape[1]
        if more > 0:
            more = max(more, self._tokens.shape[1], _LEAST_ROOM)
            grown = self._tokens.new_zeros((self._shape[0], more))
            self._tokens = torch.cat([self._tokens, grown], dim=1)
