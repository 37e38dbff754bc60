"""Choosing the next token of every row of a batch, each row by its own parameters.

    sampler = RowSampler(num_slots=64, vocab_size=49_152, device="cpu")
    sampler.put(slot, params, prompt_token_ids)  # a row joins
    plan = sampler.plan([3, 0, 5])               # whenever the set of rows changes
    sampled = sampler.sample(logits, plan)       # every step; logits[1] is the row in slot 0

A step has no Python per row, and rows that are greedy cost one pass over their logits. What a row
draws depends on its logits, its seed and its position alone: the noise is a hash of (seed,
position), not the state of a generator that the rows share.

Order of operations, as in vLLM: repetition, frequency and presence penalty, temperature, min_p,
top_k, top_p; a token that the row's grammar forbids is never drawn. Log probabilities are those of
the model, before all of these.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from app.engines.base import TokenLogprob
from app.engines.grammar import Matcher
from app.jobs import SamplingParams, int64

BAD_ROW: Final = -1
"""Stands for a token where a row's logits hold NaN or +inf, or nothing but -inf."""

GREEDY_BELOW: Final = 1e-5
"""Temperatures under this are greedy: dividing by them would only overflow."""

LEAST_PENALTY: Final = 1e-6
"""Repetition penalties under this count as this much: logits divided by less would overflow."""

LEAST_LOGPROB: Final = -9999.0
"""Of a token that cannot come, as in the OpenAI API: JSON has no word for minus infinity."""

_BLOCK: Final = 256  # torch searches an index along a row slowly; maxima of blocks come first


@dataclass(frozen=True, slots=True)
class Plan:
    """What the rows of a step need, as index tensors. Valid until a row joins or leaves.

    `random`, `penalised`, `scored` and `masked` are places in the batch, `*_slots` the slots behind
    them; `free`, `in_nucleus` and `in_top_k` are places within `random`.
    """

    random: Tensor
    random_slots: Tensor
    seed: Tensor
    top_k: Tensor
    free: Tensor  #: neither top_k nor top_p
    in_nucleus: Tensor  #: top_p alone
    in_top_k: Tensor  #: top_k, and maybe top_p
    penalised: Tensor
    penalised_slots: Tensor
    scored: Tensor
    masked: Tensor  #: places of the rows with a grammar
    temperature: Tensor
    min_p: Tensor
    top_p: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    has_min_p: bool
    max_top_k: int
    matchers: list[Matcher]  #: of the masked rows
    num_top: list[tuple[int, int]]  #: (place, how many likeliest tokens) of the scored rows


@dataclass(frozen=True, slots=True)
class Sampled:
    """Tokens of one step, [rows] int64 on the sampler's device; `BAD_ROW` where a row failed.

    Clamp the tokens to 0 before they are fed back without a look at them.
    """

    tokens: Tensor
    num_top: Seq[tuple[int, int]] = ()  #: (place, how many likeliest tokens) of the scored rows
    logprob: Tensor | None = None  #: [scored] of the chosen tokens
    top_ids: Tensor | None = None  #: [scored, k]
    top_logprobs: Tensor | None = None  #: [scored, k]

    def logprobs(self) -> dict[int, TokenLogprob]:
        """Place in the batch → log probability of its token, of the rows that asked for it."""
        if self.logprob is None or self.top_ids is None or self.top_logprobs is None:
            return {}
        chosen, logprobs = self.tokens.tolist(), self.logprob.tolist()
        ids, values = self.top_ids.tolist(), self.top_logprobs.tolist()
        return {
            row: TokenLogprob(
                chosen[row], logprobs[i], tuple(zip(ids[i][:k], values[i][:k], strict=True))
            )
            for i, (row, k) in enumerate(self.num_top)
        }


class RowSampler:
    """Owns what sampling remembers of each slot: its parameters, position, and tokens seen."""

    def __init__(self, num_slots: int, vocab_size: int, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.vocab_size = vocab_size
        self._params: list[SamplingParams | None] = [None] * num_slots
        self._seeds = [0] * num_slots
        self._matchers: list[Matcher | None] = [None] * num_slots
        octet, bit = torch.arange(256)[:, None], torch.arange(8)
        bias = torch.where(octet >> bit & 1 == 1, 0.0, float("-inf"))
        self._bias = bias.to(self.device)  #: [256, 8], of the tokens behind 8 bits of a mask
        self._position = torch.zeros(num_slots, dtype=torch.int64, device=self.device)
        self._seen = _SeenTokens(num_slots, vocab_size, self.device)

    def put(
        self,
        slot: int,
        params: SamplingParams,
        prompt_token_ids: Seq[int],
        output_token_ids: Seq[int] = (),
        matcher: Matcher | None = None,
    ) -> None:
        """Let a row into `slot`; with `output_token_ids` it goes on where it was interrupted.

        `matcher` says which tokens may come; whoever gives the row its token tells the matcher.

        Without a seed one is drawn here: to resume such a row, pass `params` with `seed_of(slot)`.
        """
        self._params[slot] = params
        self._matchers[slot] = matcher
        self._seeds[slot] = random.getrandbits(63) if params.seed is None else int64(params.seed)
        self._position[slot] = len(output_token_ids)
        if _has_penalty(params):
            room = len(prompt_token_ids) + params.max_tokens
            self._seen.put(slot, prompt_token_ids, output_token_ids, room)

    def seed_of(self, slot: int) -> int:
        """The seed in use, given or drawn."""
        return self._seeds[slot]

    def plan(self, slots: Seq[int]) -> Plan:
        """Sort the rows by what they need. `slots[i]` is the slot of the i-th row of the logits."""
        rows = [(place, slot, self._of(slot)) for place, slot in enumerate(slots)]
        drawn = [row for row in rows if row[2].temperature >= GREEDY_BELOW]
        penalised = [row for row in rows if _has_penalty(row[2])]
        matchers = [(place, m) for place, slot, _ in rows if (m := self._matchers[slot])]
        num_top = [(place, p.logprobs) for place, _, p in rows if p.logprobs is not None]
        top_k = [min(p.top_k, self.vocab_size) for _, _, p in drawn]
        ints = {
            "random": [place for place, _, _ in drawn],
            "random_slots": [slot for _, slot, _ in drawn],
            "seed": [self._seeds[slot] for _, slot, _ in drawn],
            "top_k": top_k,
            "free": [i for i, (_, _, p) in enumerate(drawn) if not p.top_k and p.top_p == 1],
            "in_nucleus": [i for i, (_, _, p) in enumerate(drawn) if not p.top_k and p.top_p < 1],
            "in_top_k": [i for i, k in enumerate(top_k) if k],
            "penalised": [place for place, _, _ in penalised],
            "penalised_slots": [slot for _, slot, _ in penalised],
            "scored": [place for place, _ in num_top],
            "masked": [place for place, _ in matchers],
        }
        columns = {
            "temperature": [p.temperature for _, _, p in drawn],
            "min_p": [p.min_p for _, _, p in drawn],
            "top_p": [p.top_p for _, _, p in drawn],
            "repetition": [max(p.repetition_penalty, LEAST_PENALTY) for _, _, p in penalised],
            "frequency": [p.frequency_penalty for _, _, p in penalised],
            "presence": [p.presence_penalty for _, _, p in penalised],
        }
        return Plan(
            **self._upload(ints, torch.int64),
            **{name: each[:, None] for name, each in self._upload(columns, torch.float32).items()},
            has_min_p=any(p.min_p for _, _, p in drawn),
            max_top_k=max(top_k, default=0),
            matchers=[matcher for _, matcher in matchers],
            num_top=num_top,
        )

    def is_needed(self, slots: Seq[int]) -> bool:
        """Whether a row has penalties, a grammar or log probabilities; the others' tokens follow
        from their own logits alone, and may be drawn elsewhere."""
        return any(
            _has_penalty(params) or params.logprobs is not None or self._matchers[slot]
            for slot in slots
            for params in [self._of(slot)]
        )

    def sample(
        self, logits: Tensor, plan: Plan, draw: Callable[[Tensor], Tensor] | None = None
    ) -> Sampled:
        """One token for each row of `logits`, [rows, vocab] in any float type; not changed.

        `draw` chooses the tokens, `BAD_ROW` included, in place of this sampler.
        """
        adjusted = self._penalise(logits, plan) if len(plan.penalised) else logits
        if plan.matchers:
            adjusted = self._mask(adjusted, plan)
        tokens = self._choose(adjusted, plan) if draw is None else draw(adjusted)
        if len(plan.penalised):
            self._seen.add(plan.penalised_slots, tokens[plan.penalised].clamp(min=0))
        return self._score(logits, tokens, plan) if plan.num_top else Sampled(tokens)

    def _choose(self, logits: Tensor, plan: Plan) -> Tensor:
        """A token for each row, or `BAD_ROW`."""
        top, tokens = _largest(logits)
        if len(plan.random):
            drawn = self._draw(logits[plan.random], top[plan.random], plan)
            tokens = tokens.index_copy(0, plan.random, drawn)
        return torch.where(torch.isfinite(top), tokens, BAD_ROW)

    def _draw(self, logits: Tensor, top: Tensor, plan: Plan) -> Tensor:
        """A token for each random row: [random, vocab] → [random]."""
        # Weights relative to the likeliest token, whose own is 1: what min_p compares with.
        weights = logits.float().sub_(top.float()[:, None]).div_(plan.temperature).exp_()
        if plan.has_min_p:
            weights *= weights >= plan.min_p
        seed, position = plan.seed, self._position[plan.random_slots]
        self._position[plan.random_slots] += 1
        tokens = torch.empty_like(seed)
        if len(at := plan.free):
            tokens[at] = _inverse_cdf(_rows(weights, at), uniform(seed[at], position[at]))
        if len(at := plan.in_nucleus):
            tokens[at] = _draw_in_nucleus(
                _rows(weights, at), plan.top_p[at], seed[at], position[at]
            )
        if len(at := plan.in_top_k):
            likeliest, ids = _rows(weights, at).topk(plan.max_top_k)
            noise = uniform(seed[at], position[at])
            places = _draw_in_top_k(likeliest, plan.top_k[at], plan.top_p[at], noise)
            tokens[at] = ids.gather(1, places[:, None])[:, 0]
        return tokens

    def _penalise(self, logits: Tensor, plan: Plan) -> Tensor:
        """Logits with penalties: only tokens that a row has seen are looked at."""
        tokens, counts = self._seen.of(plan.penalised_slots)
        rows = logits[plan.penalised].float()
        seen = rows.gather(1, tokens)
        seen = torch.where(seen > 0, seen / plan.repetition, seen * plan.repetition)
        seen = seen - plan.frequency * counts - plan.presence * (counts > 0)
        return logits.float().index_copy(0, plan.penalised, rows.scatter_(1, tokens, seen))

    def _mask(self, logits: Tensor, plan: Plan) -> Tensor:
        """Logits with -inf where a row's grammar forbids a token; what is NaN or +inf stays bad."""
        words = np.empty((len(plan.matchers), -(-self.vocab_size // 32)), np.int32)
        for row, matcher in zip(words, plan.matchers, strict=True):
            matcher.fill(row)
        octets = torch.from_numpy(words.view(np.uint8)).to(self.device).int()
        bias = embedding(octets, self._bias.to(logits.dtype)).flatten(1)[:, : self.vocab_size]
        return logits.index_add(0, plan.masked, bias)

    def _score(self, logits: Tensor, tokens: Tensor, plan: Plan) -> Sampled:
        logprobs = torch.log_softmax(logits[plan.scored].float(), dim=-1).clamp_(LEAST_LOGPROB)
        chosen = logprobs.gather(1, tokens[plan.scored].clamp(min=0)[:, None])[:, 0]
        values, ids = logprobs.topk(min(max(k for _, k in plan.num_top), self.vocab_size))
        return Sampled(tokens, plan.num_top, chosen, ids, values)

    def _of(self, slot: int) -> SamplingParams:
        params = self._params[slot]
        if params is None:
            raise LookupError(f"Nothing was put into slot {slot}.")
        return params

    def _upload(self, lists: Mapping[str, Seq[float]], dtype: torch.dtype) -> dict[str, Tensor]:
        """A tensor for each list, with one copy to the device for all."""
        flat = torch.tensor([value for each in lists.values() for value in each], dtype=dtype)
        parts = torch.split(flat.to(self.device), [len(each) for each in lists.values()])
        return dict(zip(lists, parts, strict=True))


class _SeenTokens:
    """The tokens of prompt and output of the slots whose rows have penalties.

    Nothing is allocated before the first such row: most batches have none, and the counts take
    4 bytes for each slot and token of the vocabulary.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._shape = num_slots, vocab_size
        self._device = device
        self._counts = torch.empty(0)  #: [slots, vocab], of each token in the output
        self._tokens = torch.empty(0)  #: [slots, room], filled up with the prompt's first
        self._length = torch.empty(0)  #: [slots]

    def put(self, slot: int, prompt: Seq[int], output: Seq[int], room: int) -> None:
        num_slots, _ = self._shape
        if not self._counts.numel():
            self._counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
            self._length = torch.zeros(num_slots, dtype=torch.int64, device=self._device)
            self._tokens = torch.zeros((num_slots, 0), dtype=torch.int64, device=self._device)
        if (more := room - self._tokens.shape[1]) > 0:
            # Every row starts with a token that it has seen, and repeating one changes nothing.
            first = self._tokens[:, :1] if self._tokens.numel() else self._length[:, None]
            self._tokens = torch.cat([self._tokens, first.expand(-1, more)], dim=1)
        known = torch.tensor([*prompt, *output], device=self._device)
        self._tokens[slot] = known[0]
        self._tokens[slot, : len(known)] = known
        self._length[slot] = len(known)
        self._counts[slot] = 0
        ones = torch.ones(len(output), dtype=torch.int32, device=self._device)
        self._counts[slot].index_add_(0, known[len(prompt) :], ones)

    def of(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens a row has seen, and how often each is in its output, [rows, room] both."""
        tokens = self._tokens[slots]
        return tokens, self._counts[slots[:, None], tokens]

    def add(self, slots: Tensor, tokens: Tensor) -> None:
        """One more token of each row's output."""
        places = self._length[slots].clamp(max=self._tokens.shape[1] - 1)
        self._tokens[slots, places] = tokens
        self._length[slots] += 1
        self._counts[slots, tokens] += 1


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


def _draw_in_nucleus(weights: Tensor, top_p: Tensor, seed: Tensor, position: Tensor) -> Tensor:
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
        drawn = _inverse_cdf(weights, noise)
        tokens[left] = drawn
        likelier = weights * (weights > weights.gather(1, drawn[:, None]))
        mass = likelier.sum(-1, keepdim=True)
        outside = ((mass >= needed[left]) & (mass > 0))[:, 0]
        weights, left = likelier[outside], left[outside]
        attempt += 1
    return tokens


def _draw_in_top_k(weights: Tensor, top_k: Tensor, top_p: Tensor, noise: Tensor) -> Tensor:
    """Draw a place among weights in falling order, [rows, at least top_k]; top_p within top_k."""
    ranks = torch.arange(weights.shape[1], device=weights.device)
    weights = weights * (ranks < top_k[:, None])
    mass = weights.cumsum(-1)
    kept = weights * ((mass - weights < top_p * mass[:, -1:]) | (ranks == 0))
    return _inverse_cdf(kept, noise)


def _rows(values: Tensor, at: Tensor) -> Tensor:
    """Some rows of a table, without a copy if it is all of them."""
    return values if len(at) == len(values) else values[at]


def _largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum of each row and its first place: [rows, n] → ([rows], [rows]). NaN is the largest."""
    top, block = _by_block(values, torch.amax).max(-1)
    members, first = _members(values, block, float("-inf"))
    return top, first + members.argmax(-1)


def _inverse_cdf(weights: Tensor, noise: Tensor) -> Tensor:
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


def _has_penalty(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1
        or params.frequency_penalty != 0
        or params.presence_penalty != 0
    )
