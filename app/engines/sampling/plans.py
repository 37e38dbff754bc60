"""What the rows of a step need from sampling, sorted, so that a step has no Python per row."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from app.engines.sampling.biases import FORBIDDEN, RowBiases
from app.engines.sampling.grammar import Matcher
from app.jobs import SamplingParams

GREEDY_BELOW: Final = 1e-5
"""Temperatures under this are greedy: dividing by them would only overflow."""

LEAST_PENALTY: Final = 1e-6
"""Repetition penalties under this count as this much: logits divided by less would overflow."""


@dataclass(frozen=True, slots=True)
class SampledRow:
    """What sampling knows of a row."""

    params: SamplingParams
    seed: int
    biases: RowBiases
    matcher: Matcher | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What the rows of a step need, as index tensors.

    `random`, `changed` and `scored` are places in the batch; `free`, `in_nucleus` and `in_top_k`
    are places within `random`; `penalised` and `masked`, and the rows of the biases, are places
    within `changed`.
    """

    slots: np.ndarray
    random: Tensor
    seed: Tensor
    position: Tensor  #: of the random rows; goes on with each step
    top_k: Tensor
    free: Tensor  #: neither top_k nor top_p
    in_nucleus: Tensor  #: top_p alone
    in_top_k: Tensor  #: top_k, and maybe top_p
    changed: Tensor  #: rows whose logits count otherwise than the model gave them
    penalised: Tensor
    scored: Tensor
    masked: Tensor  #: rows with a grammar
    bias_row: Tensor
    bias_token: Tensor
    forbidden_row: Tensor
    forbidden_token: Tensor
    forced_row: Tensor
    forced_token: Tensor
    temperature: Tensor
    min_p: Tensor
    top_p: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    bias: Tensor
    has_min_p: bool
    max_top_k: int
    penalised_slots: np.ndarray
    matchers: list[Matcher]  #: of the masked rows
    looking_back: list[tuple[int, RowBiases]]  #: (place within changed, what looks)
    num_top: list[tuple[int, int]]  #: (place, how many likeliest tokens) of the scored rows
    num_steps: int  #: for how many steps it holds


def make_plan(
    slots: Seq[int],
    rows: Seq[SampledRow],
    positions: Seq[int],
    vocab_size: int,
    device: torch.device,
) -> Plan:
    """Sort the rows of a step, in the order of its logits, by what they need."""
    rows_at = list(enumerate(rows))
    drawn = [row for row in rows_at if row[1].params.temperature >= GREEDY_BELOW]
    changed = [(place, row, slots[place]) for place, row in rows_at if is_changed(row)]
    penalised = [
        (i, row.params, slot) for i, (_, row, slot) in enumerate(changed) if has_penalty(row.params)
    ]
    matchers = [(i, row.matcher) for i, (_, row, _) in enumerate(changed) if row.matcher]
    num_top = [(i, k) for i, row in rows_at if (k := row.params.logprobs) is not None]
    top_k = [min(row.params.top_k, vocab_size) for _, row in drawn]
    held = [(i, row.biases, positions[place]) for i, (place, row, _) in enumerate(changed)]
    raised, forbidden, forced = _biases_at(held)
    ints = {
        "random": [place for place, _ in drawn],
        "seed": [row.seed for _, row in drawn],
        "position": [positions[place] for place, _ in drawn],
        "top_k": top_k,
        **_by_limit([row.params for _, row in drawn]),
        "changed": [place for place, _, _ in changed],
        "penalised": [i for i, _, _ in penalised],
        "scored": [place for place, _ in num_top],
        "masked": [i for i, _ in matchers],
        "bias_row": [i for i, _, _ in raised],
        "bias_token": [token for _, token, _ in raised],
        "forbidden_row": [i for i, _ in forbidden],
        "forbidden_token": [token for _, token in forbidden],
        "forced_row": [i for i, _ in forced],
        "forced_token": [token for _, token in forced],
    }
    columns = {
        "temperature": [row.params.temperature for _, row in drawn],
        "min_p": [row.params.min_p for _, row in drawn],
        "top_p": [row.params.top_p for _, row in drawn],
        "repetition": [max(p.repetition_penalty, LEAST_PENALTY) for _, p, _ in penalised],
        "frequency": [p.frequency_penalty for _, p, _ in penalised],
        "presence": [p.presence_penalty for _, p, _ in penalised],
        "bias": [bias for _, _, bias in raised],
    }
    return Plan(
        **_upload(device, ints, torch.int64),
        **{name: each[:, None] for name, each in _upload(device, columns, torch.float32).items()},
        slots=np.array(slots, np.int64),
        has_min_p=any(row.params.min_p for _, row in drawn),
        max_top_k=max(top_k, default=0),
        penalised_slots=np.array([slot for _, _, slot in penalised], np.int64),
        matchers=[matcher for _, matcher in matchers],
        looking_back=[(i, each) for i, each, _ in held if each.past],
        num_top=num_top,
        num_steps=min((each.change_after(at) - at for _, each, at in held), default=2**62),
    )


def _by_limit(drawn: Seq[SamplingParams]) -> dict[str, list[int]]:
    return {
        "free": [i for i, p in enumerate(drawn) if not p.top_k and p.top_p == 1],
        "in_nucleus": [i for i, p in enumerate(drawn) if not p.top_k and p.top_p < 1],
        "in_top_k": [i for i, p in enumerate(drawn) if p.top_k],
    }


def _biases_at(
    held: Seq[tuple[int, RowBiases, int]],
) -> tuple[list[tuple[int, int, float]], list[tuple[int, int]], list[tuple[int, int]]]:
    """Of rows at their positions: (row, token, bias), (row, token that may not come), and (row,
    the only token that may)."""
    raised, forbidden, forced = [], [], []
    for row, biases, position in held:
        for token, bias in biases.at(position):
            if bias == FORBIDDEN:
                forbidden.append((row, token))
            else:
                raised.append((row, token, bias))
        if (only := biases.forced(position)) is not None:
            forced.append((row, only))
    return raised, forbidden, forced


def is_changed(row: SampledRow) -> bool:
    return bool(row.biases or row.matcher or has_penalty(row.params))


def has_penalty(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1
        or params.frequency_penalty != 0
        or params.presence_penalty != 0
    )


def _upload(
    device: torch.device, lists: Mapping[str, Seq[float]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """A tensor for each list, with one copy to the device for all."""
    flat = torch.tensor([value for each in lists.values() for value in each], dtype=dtype)
    parts = torch.split(flat.to(device), [len(each) for each in lists.values()])
    return dict(zip(lists, parts, strict=True))
