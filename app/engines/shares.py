"""How the time of a batch that runs as a whole is shared by its rows."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import pairwise

from app.books.shares import prefill_weights, share


def shares_of(stamps_ns: Seq[int], lengths: Seq[int], steps: Seq[int]) -> list[tuple[int, int]]:
    """Each row's nanoseconds: of the first step, by its prompt, and of all others that it was in.

    `stamps_ns` are those of the start and of the end of each step, `lengths` of prompts, and
    `steps` how many each row was in. Steps after the last row's belong to all.
    """
    ends = sorted({1, *steps} - {0})
    prefill = share(stamps_ns[1] - stamps_ns[0], prefill_weights(lengths))
    shares = []
    for begin, end in pairwise(ends):
        present = [int(taken >= end) for taken in steps]
        shares.append(share(stamps_ns[end] - stamps_ns[begin], present))
    shares.append(share(stamps_ns[-1] - stamps_ns[ends[-1]], [1] * len(steps)))
    decode = map(sum, zip(*shares, strict=True))
    return list(zip(prefill, decode, strict=True))
