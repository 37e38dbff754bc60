"""Which tokens the next step computes, and whose blocks they are kept in.

Every row is treated alike: it has tokens, of which the first `computed` are in the cache, and the
next step computes some of the rest. A decoding row has one token left; a prompt has many, and gets
them in chunks within the step's budget. Rows are served by priority, then age. When the cache is
full, the last of them in this order gives up its blocks and waits again, with the tokens it has.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from heapq import merge
from itertools import groupby

import numpy as np

from app.engines.base import Breakdown, Generation, Sequence
from app.engines.inflight.cache import BLOCK, blocks_for
from app.engines.inflight.prefix import Match, Node, PrefixCache
from app.engines.text.stopping import Output
from app.jobs import SamplingParams


@dataclass(slots=True, eq=False)
class Row:
    """One sequence inside the engine. `slot` and what follows it is the scheduler's to write."""

    sequence: Sequence
    params: SamplingParams
    batch_id: str
    arrival: int
    generation: Generation
    output: Output
    tokens: list[int]  #: prompt and output so far; the last may be `staging.PENDING`
    breakdown: Breakdown = field(default_factory=Breakdown)
    gave_way_ns: int = 0  #: when it was preempted, until it joins again
    flights: int = 0  #: steps it is in that have not landed
    furthest: int = 0  #: tokens that were computed once; after a preemption some are again
    slot: int = -1  #: its place in the block table and in the sampler
    computed: int = 0  #: leading tokens that are in the cache
    blocks: list[int] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)  #: of the first blocks; the others are its own

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller is served first."""
        return self.sequence.priority, self.arrival


@dataclass(frozen=True, slots=True)
class Segment:
    """The next `count` tokens of a row."""

    row: Row
    start: int
    count: int

    @property
    def is_last(self) -> bool:
        """Whether the row's next token can be sampled after this."""
        return self.start + self.count == len(self.row.tokens)


@dataclass(frozen=True, slots=True)
class Schedule:
    segments: list[Segment]
    copies: list[tuple[int, int]]  #: blocks, (from, to), to be copied before the step
    joined: list[Row]  #: rows that have a slot since this step
    preempted: list[Row]  #: rows that have none any more


class Scheduler:
    """Owns the rows, their slots and their blocks."""

    def __init__(
        self, num_rows: int, num_blocks: int, context_tokens: int, least_copied: int = 1
    ) -> None:
        """A block that begins like what a prompt goes on with is copied for so many tokens or more:
        else they are computed again."""
        self.num_rows = num_rows
        self.num_blocks = num_blocks
        self.tables = np.zeros((num_rows, blocks_for(context_tokens)), np.int32)
        self._least_copied = least_copied
        self.clear()

    def clear(self) -> None:
        """No rows, and nothing kept of any."""
        self.waiting: list[Row] = []  # by rank
        self.running: list[Row] = []  # by rank
        self._slots = list(reversed(range(self.num_rows)))
        self._free = list(reversed(range(self.num_blocks)))
        self._prefixes = PrefixCache(self._least_copied)
        self._preempted: list[Row] = []  # since the last schedule

    def add(self, row: Row) -> None:
        insort(self.waiting, row, key=_rank)

    def schedule(self, prefill_tokens: int) -> Schedule:
        """What to compute now: a token of every decoding row, and up to `prefill_tokens` others."""
        segments, preempted = self._decoding()
        prompts = [row for row in self.running if _left(row) > 1]
        if not preempted:
            prompts = list(merge(prompts, self.waiting, key=_rank))
        copies: dict[int, int] = {}
        joined: list[Row] = []
        for _, alike in groupby(prompts, key=_priority):
            for row, count in self._shared_out(list(alike), prefill_tokens, copies, joined):
                segments.append(Segment(row, row.computed, count))
                prefill_tokens -= count
        gone, self._preempted = self._preempted, []
        return Schedule(segments, [(source, to) for to, source in copies.items()], joined, gone)

    def _decoding(self) -> tuple[list[Segment], bool]:
        """A token of every row that has one left, and whether others gave way to them."""
        segments: list[Segment] = []
        preempted, place = False, 0
        while place < len(self.running):
            row = self.running[place]
            if _left(row) != 1:  # a prompt, which has had room since it joined, or all is computed
                place += 1
                continue
            while not self._make_room(row, row.computed + 1):
                preempted = True
                if self._preempt() is row:
                    break
            else:
                place += 1
                segments.append(Segment(row, row.computed, 1))
        return segments, preempted

    def _shared_out(
        self, rows: list[Row], budget: int, copies: dict[int, int], joined: list[Row]
    ) -> list[tuple[Row, int]]:
        """Prompts of one priority, in order, and how much of each is computed; those that wait are
        let in while there are slots, budget and blocks.

        A long one takes half of what is left at most, and leaves half of all to short ones behind
        it; what nobody wants then goes to the first.
        """
        half = budget // 2
        short = sum(left for row in rows if (left := _left(row)) <= half)
        counts: dict[Row, int] = {}
        is_full = False
        for row in rows:
            left = _left(row)
            if left <= half:
                short -= left
                most = budget
            else:
                most = max(0, min(-(-budget // 2), budget - min(half, short)))
            if row.slot < 0:
                is_full = is_full or not self._slots
                if is_full or most <= 0:
                    continue
                match = self._match(row)
                if match.worth_waiting:
                    continue
                if not self._join(row, match, copies):
                    is_full = True
                    continue
                joined.append(row)
            counts[row] = min(_left(row), most)
            budget -= counts[row]
        for row, count in counts.items():
            more = min(_left(row) - count, budget)
            counts[row] += more
            budget -= more
        return [(row, count) for row, count in counts.items() if count]

    def advance(self, segments: Seq[Segment]) -> None:
        """The step is done, or will be before the next: what it computed is in the cache."""
        for segment in segments:
            row = segment.row
            row.computed = segment.start + segment.count
            self._share(row)

    def vouch(self, row: Row) -> None:
        """The row has a token: what it was computed from is sound."""
        if row.nodes and not row.nodes[-1].is_sound:
            for node in row.nodes:
                node.is_sound = True

    def _share(self, row: Row) -> None:
        """Let others use what is computed of the row's prompt."""
        if row.nodes and row.nodes[-1].ready < len(row.nodes[-1].tokens):
            for place, node in enumerate(row.nodes):
                ready = min(len(node.tokens), row.computed - place * BLOCK)
                node.ready = max(node.ready, ready)

    def lose(self, row: Row) -> None:
        """Nobody is to begin with what the row computed, which was no number."""
        self._free += self._prefixes.lose(row.nodes)
        row.computed = 0

    def remove(self, row: Row) -> None:
        """The row leaves for good; it may be running or waiting."""
        if row.slot < 0:
            self.waiting.remove(row)
        else:
            self.running.remove(row)
            self._give_back(row)

    def _join(self, row: Row, match: Match, copies: dict[int, int]) -> bool:
        """Let a waiting row in with what the cache holds of it, if there are blocks for the rest.

        Each running row may soon want one more block: that is left, or they would preempt it.
        """
        self._prefixes.use(match.nodes)
        needed = blocks_for(len(row.tokens)) - len(match.nodes)
        if needed + len(self.running) > self._num_available and self.running:
            self._prefixes.release(match.nodes)
            return False
        self.waiting.remove(row)
        insort(self.running, row, key=_rank)
        row.slot = self._slots.pop()
        row.nodes = list(match.nodes)
        row.computed = match.num_tokens
        for node in match.nodes:
            self._append(row, node.block)
        self._make_room(row, len(row.tokens))
        if match.partial:
            # A block that is itself a copy of this step: go to where that comes from.
            source = copies.get(match.partial.block, match.partial.block)
            copies[row.blocks[len(match.nodes)]] = source
        self._publish(row)
        return True

    def _match(self, row: Row) -> Match:
        """What is computed already; nothing where every token's logits are to be looked at."""
        if row.params.prompt_logprobs is not None:
            return Match([], None, 0, False)
        return self._prefixes.match(row.sequence.tenant, row.tokens, _priority(row))

    def _publish(self, row: Row) -> None:
        """Let prompts that begin like this one use its blocks as they are computed."""
        sequence = row.sequence
        prompt = sequence.prompt_token_ids
        blocks = row.blocks[: blocks_for(len(prompt))]
        row.nodes += self._prefixes.publish(
            sequence.tenant, prompt, row.nodes, blocks, sequence.priority
        )
        self._share(row)  # what it copies is computed already

    @property
    def _num_available(self) -> int:
        return len(self._free) + self._prefixes.num_idle

    def _make_room(self, row: Row, num_tokens: int) -> bool:
        """Blocks for the row's first `num_tokens`; False if there are not enough."""
        while len(row.blocks) * BLOCK < num_tokens:
            block = self._free.pop() if self._free else self._prefixes.evict()
            if block is None:
                return False
            self._append(row, block)
        return True

    def _append(self, row: Row, block: int) -> None:
        self.tables[row.slot, len(row.blocks)] = block
        row.blocks.append(block)

    def _preempt(self) -> Row:
        """The youngest row of the lowest priority gives up its blocks and waits again."""
        row = self.running.pop()
        self._give_back(row)
        self.add(row)
        self._preempted.append(row)
        return row

    def _give_back(self, row: Row) -> None:
        known = row.computed
        while known and row.tokens[known - 1] < 0:  # pending: nobody knows yet what it is
            known -= 1
        tokens, tenant = row.tokens[:known], row.sequence.tenant
        self._free += self._prefixes.leave(tenant, tokens, row.nodes, row.blocks)
        self._slots.append(row.slot)
        row.slot, row.computed, row.blocks, row.nodes = -1, 0, [], []


def _rank(row: Row) -> tuple[int, int]:
    return row.rank


def _priority(row: Row) -> int:
    return row.sequence.priority


def _left(row: Row) -> int:
    """Tokens to compute before its next one can be sampled."""
    return len(row.tokens) - row.computed
