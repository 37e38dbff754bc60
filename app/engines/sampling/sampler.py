"""Choosing the next token of every row of a batch, each row by its own parameters.

    sampler = RowSampler(num_slots=64, vocab_size=49_152, device="cpu")
    sampler.put(slot, params, prompt_token_ids)   # a row joins
    plan = sampler.plan([3, 0, 5])                # at each step; costs nothing while it holds
    sampled = sampler.sample(logits, plan)        # logits[1] is the row in slot 0

A step has no Python per row, but for rows whose rules look back, and rows that are greedy cost one
pass over their logits. What a row draws depends on its logits, its seed and its position alone.

Order of operations, as in vLLM: biases, repetition, frequency and presence penalty, what is
forbidden, temperature, min_p, top_k, top_p; a token that the row's grammar forbids is never drawn.
Where all that the grammar allows is forbidden otherwise, the grammar holds. Log probabilities are
those of the model, before all of these.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from app.engines.base import LEAST_LOGPROB, TokenLogprob
from app.engines.checkpoint.generation_config import GenerationRules
from app.engines.sampling import draws
from app.engines.sampling.biases import FORBIDDEN, RowBiases
from app.engines.sampling.grammar import Matcher
from app.engines.sampling.penalties import SeenTokens
from app.engines.sampling.plans import Plan, SampledRow, has_penalty, is_changed, make_plan
from app.jobs import SamplingParams, int64

BAD_ROW: Final = -1
"""Stands for a token where a row's logits hold NaN or +inf, or nothing but -inf."""

_NO_RULES: Final = GenerationRules()


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

    def __init__(
        self,
        num_slots: int,
        vocab_size: int,
        device: str | torch.device,
        rules: GenerationRules = _NO_RULES,
        eos_token_ids: Collection[int] = (),
        largest: Callable[[Tensor], tuple[Tensor, Tensor]] = draws.largest,
    ) -> None:
        """`vocab_size` is the width of the logits, whatever the tokenizer's; `rules` are the
        model's own, and `eos_token_ids` end its outputs. `largest` is `draws.largest`, or does the
        same."""
        self.device = torch.device(device)
        self.vocab_size = vocab_size
        self._rules = rules
        self._eos_token_ids = eos_token_ids
        self._largest = largest
        self._slots: list[SampledRow | None] = [None] * num_slots
        self._positions = np.zeros(num_slots, np.int64)  #: tokens of each row's output
        octet, bit = torch.arange(256)[:, None], torch.arange(8)
        bias = torch.where(octet >> bit & 1 == 1, 0.0, FORBIDDEN)
        self._bias = bias.to(self.device)  #: [256, 8], of the tokens behind 8 bits of a mask
        self._seen = SeenTokens(num_slots, vocab_size, self.device)
        self._planned: tuple[list[int], Plan, int] | None = None  #: and steps for which it holds

    def put(
        self,
        slot: int,
        params: SamplingParams,
        prompt_token_ids: Seq[int],
        output_token_ids: Seq[int] = (),
        matcher: Matcher | None = None,
    ) -> None:
        """Let a row into `slot`; with `output_token_ids` it goes on where it was interrupted.

        Rules that look back (`biases.reads`) read `output_token_ids` again at each step: keep it
        up to date. `matcher` says which tokens may come; whoever gives the row its token tells it.

        Without a seed one is drawn here: to resume such a row, pass `params` with `seed_of(slot)`.
        """
        self._planned = None
        biases = RowBiases(
            params,
            self._rules,
            self._eos_token_ids,
            self.vocab_size,
            prompt_token_ids,
            output_token_ids,
        )
        seed = random.getrandbits(63) if params.seed is None else int64(params.seed)
        self._slots[slot] = SampledRow(params, seed, biases, matcher)
        self._positions[slot] = len(output_token_ids)
        if has_penalty(params):
            self._seen.put(slot, prompt_token_ids, output_token_ids)

    def looks_back(self, slot: int) -> bool:
        """Whether what may come next in the slot follows from tokens that were sampled."""
        found = self._slots[slot] if slot >= 0 else None
        return found is not None and found.biases.past is not None

    def seed_of(self, slot: int) -> int:
        """The seed in use, given or drawn."""
        return self._of(slot).seed

    def plan(self, slots: Seq[int]) -> Plan:
        """Sort the rows by what they need. `slots[i]` is the slot of the i-th row of the logits.

        The last plan comes back as long as it holds.
        """
        if self._planned is not None:
            planned, plan, steps = self._planned
            if steps and planned == list(slots):
                return plan
        rows, positions = [self._of(slot) for slot in slots], self._positions[list(slots)].tolist()
        plan = make_plan(slots, rows, positions, self.vocab_size, self.device)
        self._planned = list(slots), plan, plan.num_steps
        return plan

    def is_needed(self, slots: Seq[int]) -> bool:
        """Whether a row has biases, penalties, a grammar or log probabilities; the others' tokens
        follow from their own logits alone, and may be drawn elsewhere."""
        return any(
            is_changed(each) or each.params.logprobs is not None for each in map(self._of, slots)
        )

    def sample(
        self, logits: Tensor, plan: Plan, draw: Callable[[Tensor], Tensor] | None = None
    ) -> Sampled:
        """One token for each row of `logits`, [rows, vocab] in any float type; not changed.

        `draw` chooses the tokens, `BAD_ROW` included, in place of this sampler.
        """
        adjusted = self._adjust(logits, plan) if len(plan.changed) else logits
        tokens = self._choose(adjusted, plan) if draw is None else draw(adjusted)
        if len(plan.penalised_slots):
            places = plan.changed[plan.penalised]
            self._seen.add(plan.penalised_slots, tokens[places].clamp(min=0))
        self._go_on(plan)
        return self._score(logits, tokens, plan) if plan.num_top else Sampled(tokens)

    def _go_on(self, plan: Plan) -> None:
        plan.position.add_(1)
        self._positions[plan.slots] += 1
        if self._planned is not None and self._planned[1] is plan:
            self._planned = (*self._planned[:2], self._planned[2] - 1)

    def _choose(self, logits: Tensor, plan: Plan) -> Tensor:
        """A token for each row, or `BAD_ROW`."""
        top, tokens = self._largest(logits)
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
        seed, position = plan.seed, plan.position
        tokens = torch.empty_like(seed)
        if len(at := plan.free):
            noise = draws.uniform(seed[at], position[at])
            tokens[at] = draws.inverse_cdf(draws.rows(weights, at), noise)
        if len(at := plan.in_nucleus):
            tokens[at] = draws.draw_in_nucleus(
                draws.rows(weights, at), plan.top_p[at], seed[at], position[at]
            )
        if len(at := plan.in_top_k):
            likeliest, ids = draws.rows(weights, at).topk(plan.max_top_k)
            noise = draws.uniform(seed[at], position[at])
            places = draws.draw_in_top_k(likeliest, plan.top_k[at], plan.top_p[at], noise)
            tokens[at] = ids.gather(1, places[:, None])[:, 0]
        return tokens

    def _adjust(self, logits: Tensor, plan: Plan) -> Tensor:
        """Logits as they count for these rows, float32; what is NaN or +inf stays bad."""
        rows = logits[plan.changed].float()
        if len(plan.bias):
            rows.index_put_((plan.bias_row, plan.bias_token), plan.bias[:, 0], accumulate=True)
        past = self._past(plan)
        self._add(rows, [each for each in past if each[2] != FORBIDDEN])
        if len(plan.penalised_slots):
            self._penalise(rows, plan)
        mask = self._mask(plan) if plan.matchers else None
        allowed = self._allow(rows, plan, [each for each in past if each[2] == FORBIDDEN])
        if mask is not None:
            rows.index_add_(0, plan.masked, mask)
        if allowed is not rows:
            if mask is not None:
                allowed.index_add_(0, plan.masked, mask)
            nothing = allowed.amax(-1, keepdim=True) == FORBIDDEN
            rows = torch.where(nothing, rows, allowed)  # what forbids gives way
        if len(rows) == len(logits):
            return rows
        return logits.float().index_copy(0, plan.changed, rows)

    def _penalise(self, rows: Tensor, plan: Plan) -> None:
        """Only tokens that a row has seen are looked at."""
        row, token, count = self._seen.of(plan.penalised_slots)
        place = plan.penalised[row]
        seen = rows[place, token]
        repetition, frequency, presence = (
            each[row, 0] for each in (plan.repetition, plan.frequency, plan.presence)
        )
        seen = torch.where(seen > 0, seen / repetition, seen * repetition)
        rows[place, token] = seen - frequency * count - presence * (count > 0)

    def _past(self, plan: Plan) -> list[tuple[int, int, float]]:
        """Row, token and bias of all that follows from the rows' own tokens."""
        return [
            (place, token, bias)
            for place, biases in plan.looking_back
            if biases.past
            for token, bias in biases.past.biases()
        ]

    def _add(self, rows: Tensor, past: list[tuple[int, int, float]]) -> None:
        if past:
            row, token, bias = torch.tensor(past, dtype=torch.float64, device=self.device).T
            rows.index_put_((row.long(), token.long()), bias.float(), accumulate=True)

    def _allow(self, rows: Tensor, plan: Plan, past: list[tuple[int, int, float]]) -> Tensor:
        """The same with -inf for what is forbidden, `past` among it, or itself if nothing is."""
        if not (past or len(plan.forbidden_row) or len(plan.forced_row)):
            return rows
        allowed = rows.clone()
        allowed[plan.forbidden_row, plan.forbidden_token] += FORBIDDEN
        self._add(allowed, past)
        if len(plan.forced_row):
            kept = allowed[plan.forced_row, plan.forced_token]
            allowed[plan.forced_row] += FORBIDDEN
            allowed[plan.forced_row, plan.forced_token] = kept.clamp(min=LEAST_LOGPROB)
        return allowed

    def _mask(self, plan: Plan) -> Tensor:
        """0 where a row's grammar allows a token and -inf elsewhere: [masked, vocab]."""
        words = np.zeros((len(plan.matchers), -(-self.vocab_size // 32)), np.int32)
        for row, matcher in zip(words, plan.matchers, strict=True):
            matcher.fill(row)
        octets = torch.from_numpy(words.view(np.uint8)).to(self.device).int()
        return embedding(octets, self._bias).flatten(1)[:, : self.vocab_size]

    def _score(self, logits: Tensor, tokens: Tensor, plan: Plan) -> Sampled:
        logprobs = torch.log_softmax(logits[plan.scored].float(), dim=-1).clamp_(LEAST_LOGPROB)
        chosen = logprobs.gather(1, tokens[plan.scored].clamp(min=0)[:, None])[:, 0]
        values, ids = logprobs.topk(min(max(k for _, k in plan.num_top), self.vocab_size))
        return Sampled(tokens, plan.num_top, chosen, ids, values)

    def _of(self, slot: int) -> SampledRow:
        found = self._slots[slot]
        if found is None:
            raise LookupError(f"Nothing was put into slot {slot}.")
        return found
