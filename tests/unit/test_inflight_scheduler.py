"""Which tokens a step computes, and that the cache holds what a row takes from it."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.engines.base import Generation, Sequence
from app.engines.inflight.cache import BLOCK
from app.engines.inflight.scheduler import Row, Schedule, Scheduler
from app.jobs import FinishReason, SamplingParams

CONTEXT = 4096


def row_of(
    place: int, prompt: Seq[int], *, max_tokens: int = 4, priority: int = 0, tenant: str = "a"
) -> Row:
    params = SamplingParams(max_tokens)
    output: Any = None
    return Row(
        sequence=Sequence(place, tuple(prompt), params, tenant, priority),
        params=params,
        batch_id="b",
        arrival=place,
        generation=Generation(place, FinishReason.ERROR),
        output=output,
        tokens=list(prompt),
    )


def distinct(place: int, length: int) -> range:
    return range(place * 10_000, place * 10_000 + length)


def step(scheduler: Scheduler, budget: int) -> dict[int, int]:
    """One step: how many tokens of each row it computes. Rows that are due go on."""
    schedule = scheduler.schedule(budget)
    scheduler.advance(schedule.segments)
    for segment in schedule.segments:
        if segment.start + segment.count == len(segment.row.tokens):
            scheduler.vouch(segment.row)
            segment.row.tokens.append(7)
    return {segment.row.sequence.id: segment.count for segment in schedule.segments}


def test_a_short_prompt_does_not_wait_for_a_long_one_to_end() -> None:
    # given one of 3,000 tokens under way
    scheduler = Scheduler(8, 400, CONTEXT)
    scheduler.add(row_of(1, distinct(1, 3000)))
    assert step(scheduler, 64) == {1: 64}  # alone it has all of the budget

    # when one of 23 comes
    scheduler.add(row_of(2, distinct(2, 23)))

    # then it has its first token after this step, and not after 48
    counts = step(scheduler, 64)
    assert sum(counts.values()) == 64
    assert step(scheduler, 64)[2] == 1


def test_a_short_prompt_is_served_behind_any_number_of_long_ones() -> None:
    scheduler = Scheduler(9, 900, CONTEXT)
    for place in range(1, 8):
        scheduler.add(row_of(place, distinct(place, 3000)))
    step(scheduler, 256)

    scheduler.add(row_of(9, distinct(9, 40)))

    assert step(scheduler, 256)[9] == 40


@given(
    prompts=st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 400)),
        max_size=8,
        unique_by=lambda each: each[0],
    ),
    budget=st.integers(1, 100),
)
@example(prompts=[(5, 400), (1, 16), (2, 16), (9, 10)], budget=32)
@settings(deadline=None)
def test_shares_of_a_step_are_never_negative_nor_more_than_it(
    prompts: list[tuple[int, int]], budget: int
) -> None:
    # given prompts that come one after the other, some of them before others by rank
    scheduler = Scheduler(8, 900, CONTEXT)
    for place, length in prompts:
        scheduler.add(row_of(place, distinct(place, length)))

        # when
        schedule = scheduler.schedule(budget)
        scheduler.advance(schedule.segments)

        # then
        counts = [segment.count for segment in schedule.segments]
        assert min(counts) > 0
        assert sum(count for count in counts if count > 1) <= budget


def test_the_whole_budget_is_used_as_long_as_there_are_prompts() -> None:
    scheduler = Scheduler(8, 900, CONTEXT)
    for place in range(1, 6):
        scheduler.add(row_of(place, distinct(place, 700)))

    counts = [step(scheduler, 256) for _ in range(4)]

    assert [sum(each.values()) for each in counts] == [256] * 4
    assert all(each[1] == max(each.values()) for each in counts)  # the oldest has most


def test_rank_orders_prompts_whether_they_run_or_wait() -> None:
    # given a prompt of low priority under way
    scheduler = Scheduler(8, 400, CONTEXT)
    scheduler.add(row_of(1, distinct(1, 3000), priority=5))
    step(scheduler, 64)

    # when a long one of a better priority comes
    scheduler.add(row_of(2, distinct(2, 200), priority=0))

    # then it is computed first, and what it leaves goes to the other
    assert [step(scheduler, 64) for _ in range(4)] == [{2: 64}] * 3 + [{2: 8, 1: 56}]


def test_a_shared_beginning_is_used_as_soon_as_the_chunk_that_holds_it_is_computed() -> None:
    # given a long prompt under way, and one that begins like it and soon goes on otherwise
    scheduler = Scheduler(8, 400, CONTEXT)
    scheduler.add(row_of(1, distinct(1, 3000)))
    step(scheduler, 64)
    scheduler.add(row_of(2, [*distinct(1, 100), *distinct(2, 9)]))

    # when it has computed what they share
    assert 2 not in step(scheduler, 64)

    # then the other takes it: 3,000 tokens are not waited for
    assert step(scheduler, 64)[2] == 9


def test_nobody_waits_for_a_beginning_that_a_lower_priority_computes() -> None:
    scheduler = Scheduler(8, 400, CONTEXT)
    scheduler.add(row_of(1, distinct(1, 600), priority=5))
    step(scheduler, 64)

    scheduler.add(row_of(2, distinct(1, 500), priority=0))

    assert step(scheduler, 64) == {2: 64}


def test_what_a_row_generated_is_there_for_the_next_turn() -> None:
    # given a row that has answered, to the middle of its third block
    scheduler = Scheduler(2, 40, CONTEXT)
    first = row_of(1, distinct(1, 40), max_tokens=40)
    scheduler.add(first)
    while len(first.tokens) < 40 + 40:
        step(scheduler, 64)
    scheduler.remove(first)

    # when the next prompt is all of that and more
    second = row_of(2, [*first.tokens, *distinct(2, 12)])
    scheduler.add(second)

    # then only what is new is computed: the last token of the answer was never fed back
    assert step(scheduler, 64) == {2: 1 + 12}


def test_two_rows_that_generated_the_same_keep_it_once() -> None:
    scheduler = Scheduler(2, 40, CONTEXT)
    rows = [row_of(place, distinct(1, 40)) for place in (1, 2)]
    for row in rows:
        scheduler.add(row)
    while any(len(row.tokens) < 80 for row in rows):
        step(scheduler, 64)

    for row in rows:
        scheduler.remove(row)

    assert scheduler._prefixes.num_idle == 3
    assert scheduler._num_available == 40


def test_what_came_to_no_number_is_begun_with_by_nobody() -> None:
    # given two that share a beginning, of which one turns out to be no number
    scheduler = Scheduler(3, 40, CONTEXT)
    bad = row_of(1, distinct(1, 200))
    scheduler.add(bad)
    step(scheduler, 64)
    other = row_of(2, [*distinct(1, 50), *distinct(2, 100)])
    scheduler.add(other)
    step(scheduler, 64)
    assert other.nodes

    # when
    scheduler.lose(bad)
    scheduler.remove(bad)
    scheduler.add(row_of(3, distinct(1, 60)))

    # then a third computes all of it itself, and every block comes back
    assert step(scheduler, 1000)[3] == 60
    scheduler.remove(other)
    for row in list(scheduler.running):
        scheduler.remove(row)
    assert scheduler._num_available == 40


visits = st.tuples(
    st.integers(0, 2),  # a family of prompts
    st.integers(1, 150),  # tokens of its common text
    st.lists(st.integers(0, 2), max_size=40),  # and of its own
    st.integers(1, 60),  # tokens of its answer
    st.integers(0, 2),  # priority
    st.sampled_from(["a", "a", "b"]),
    st.sampled_from(["ends"] * 5 + ["cancelled", "lost"]),
)


@given(
    arrivals=st.lists(visits, min_size=3, max_size=12),
    budget=st.sampled_from([1, 7, 40, 300]),
    num_rows=st.integers(1, 5),
    num_blocks=st.integers(9, 24),
    least_copied=st.sampled_from([1, 16]),
    seed=st.integers(0, 999),
)
@settings(max_examples=100, deadline=None)
def test_a_row_finds_in_the_cache_what_it_would_have_computed_itself(
    arrivals: list[Any], budget: int, num_rows: int, num_blocks: int, least_copied: int, seed: int
) -> None:
    # given a cache of which we know what each place was computed from
    chance = random.Random(seed)
    scheduler = Scheduler(num_rows, num_blocks, CONTEXT, least_copied)
    memory = Memory()
    rows: dict[int, tuple[Row, int, str]] = {}

    # when rows come, answer, give way, are cancelled or come to no number
    for place, (family, common, own, answer, priority, tenant, end) in enumerate(arrivals):
        prompt = [*distinct(family, common), *own]
        row = row_of(place, prompt, max_tokens=answer, priority=priority, tenant=tenant)
        rows[place] = row, len(prompt) + answer, end
        scheduler.add(row)
        for _ in range(chance.randrange(4)):
            run(scheduler, memory, rows, budget, chance)
    for _ in range(20_000):
        if not rows:
            break
        run(scheduler, memory, rows, budget, chance)

    # then all of them came to an end, and every block came back, once
    assert not rows
    assert scheduler._num_available == num_blocks
    assert len({*scheduler._free}) == len(scheduler._free)


class Memory:
    """What each place of the cache was computed from."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, int], int] = {}

    def run(self, schedule: Schedule) -> None:
        before = dict(self.places) if schedule.copies else {}
        for source, to in schedule.copies:
            for place in range(BLOCK):
                self.places[to, place] = before.get((source, place), 0)
        for segment in schedule.segments:
            row, end = segment.row, segment.start + segment.count
            assert segment.count > 0
            known = hash(row.sequence.tenant)
            for position in range(end):
                at = row.blocks[position // BLOCK], position % BLOCK
                known = hash((known, row.tokens[position]))
                if position >= segment.start:
                    self.places[at] = known
                assert self.places[at] == known
        written = [
            (segment.row.blocks[position // BLOCK], position % BLOCK)
            for segment in schedule.segments
            for position in range(segment.start, segment.start + segment.count)
        ]
        assert len(set(written)) == len(written)


def run(
    scheduler: Scheduler,
    memory: Memory,
    rows: dict[int, tuple[Row, int, str]],
    budget: int,
    chance: random.Random,
) -> None:
    schedule = scheduler.schedule(budget)
    prefilled = [each for each in schedule.segments if len(each.row.tokens) - each.start > 1]
    assert sum(each.count for each in prefilled) <= budget
    memory.run(schedule)
    scheduler.advance(schedule.segments)
    for segment in schedule.segments:
        row = segment.row
        _, length, end = rows[row.sequence.id]
        if segment.start + segment.count < len(row.tokens):
            continue
        if end == "lost" and chance.random() < 0.3:
            scheduler.lose(row)
            scheduler.remove(row)
            del rows[row.sequence.id]
            continue
        scheduler.vouch(row)
        row.tokens.append(chance.randrange(2))
        if len(row.tokens) >= length:
            scheduler.remove(row)
            del rows[row.sequence.id]
    for place, (row, _, end) in list(rows.items()):
        if end == "cancelled" and chance.random() < 0.1:
            scheduler.remove(row)
            del rows[place]
