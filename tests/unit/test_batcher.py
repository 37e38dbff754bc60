"""The batching rule, under a clock that the tests turn by hand."""

from __future__ import annotations

import dataclasses
import uuid

from hypothesis import given, settings
from hypothesis import strategies as st

from app.jobs import CloseReason
from app.worker.batcher import (
    GATHER_NS,
    STARVATION_BATCHES,
    STATIC_WAIT_NS,
    Batcher,
    Candidate,
    Capacity,
    Limits,
)

MS = 1_000_000
LIMITS = Limits(max_batch_size=4, max_batch_tokens=1_000, max_wait_ns=50 * MS)
IDLE = Capacity(free_rows=4)


def candidate(arrived_ms: float = 0, **changes: object) -> Candidate:
    values: dict[str, object] = {
        "job_id": uuid.uuid4(),
        "group": "g",
        "num_sequences": 1,
        "prompt_tokens": 10,
        "max_new_tokens": 10,
        "arrived_ns": int(arrived_ms * MS),
    }
    return Candidate(**{**values, **changes})  # type: ignore[arg-type]


def batcher(*candidates: Candidate, limits: Limits = LIMITS) -> Batcher:
    made = Batcher({"g": limits, "other": limits})
    for each in candidates:
        made.add(each)
    return made


def test_a_full_batch_closes_at_once_by_size() -> None:
    waiting = batcher(*(candidate() for _ in range(5)))

    closed = waiting.close("g", IDLE, now_ns=0)

    assert closed is not None
    assert closed.reason is CloseReason.SIZE
    assert len(closed.members) == 4
    assert len(waiting) == 1


def test_a_lone_candidate_waits_for_company_until_max_wait() -> None:
    waiting = batcher(candidate(arrived_ms=10))

    assert waiting.close("g", IDLE, now_ns=59 * MS) is None
    assert waiting.next_close_ns({"g": IDLE}) == 60 * MS
    closed = waiting.close("g", IDLE, now_ns=60 * MS)

    assert closed is not None
    assert closed.reason is CloseReason.WAIT
    assert closed.wait_ns == 50 * MS


def test_the_wait_counts_from_the_oldest_member_not_the_latest() -> None:
    waiting = batcher(candidate(arrived_ms=0), candidate(arrived_ms=49))

    closed = waiting.close("g", IDLE, now_ns=50 * MS)

    assert closed is not None
    assert len(closed.members) == 2


def test_a_batch_closes_by_tokens_before_the_padded_size_passes_the_limit() -> None:
    short, long = candidate(prompt_tokens=10), candidate(arrived_ms=1, prompt_tokens=600)
    waiting = batcher(short, long)

    closed = waiting.close("g", IDLE, now_ns=2 * MS)

    assert closed is not None
    assert closed.reason is CloseReason.TOKENS
    assert closed.members == (short,)


def test_a_running_engine_gets_candidates_after_a_moment_and_not_after_the_whole_wait() -> None:
    waiting = batcher(candidate())
    running = Capacity(free_rows=2, joins=True, is_empty=False)

    assert waiting.close("g", running, now_ns=GATHER_NS - 1) is None
    assert waiting.next_close_ns({"g": running}) == GATHER_NS
    closed = waiting.close("g", running, now_ns=GATHER_NS)

    assert closed is not None
    assert closed.reason is CloseReason.JOIN


def test_an_idle_engine_that_takes_company_later_starts_at_once() -> None:
    waiting = batcher(candidate(), limits=dataclasses.replace(LIMITS, max_wait_ns=None))
    joins = Capacity(free_rows=4, joins=True)

    assert waiting.next_close_ns({"g": joins}) == GATHER_NS
    closed = waiting.close("g", joins, now_ns=GATHER_NS)

    assert closed is not None
    assert closed.reason is CloseReason.JOIN
    assert GATHER_NS <= 5 * MS


def test_an_engine_that_nobody_can_join_waits_for_company_unless_it_is_set() -> None:
    unset = batcher(candidate(), limits=dataclasses.replace(LIMITS, max_wait_ns=None))

    assert unset.next_close_ns({"g": IDLE}) == STATIC_WAIT_NS
    assert batcher(candidate()).next_close_ns({"g": IDLE}) == LIMITS.max_wait_ns


def test_a_wait_that_is_set_holds_for_engines_that_take_company_later_too() -> None:
    waiting = batcher(candidate())
    joins = Capacity(free_rows=4, joins=True)

    assert waiting.close("g", joins, now_ns=49 * MS) is None
    assert waiting.close("g", joins, now_ns=50 * MS) is not None


def test_behind_a_batch_that_runs_the_next_closes_when_it_is_full_and_not_before() -> None:
    ahead = Capacity(free_rows=4, is_ahead=True)
    waiting = batcher(*(candidate() for _ in range(3)))

    assert waiting.close("g", ahead, now_ns=10_000 * MS) is None
    assert waiting.next_close_ns({"g": ahead}) is None
    waiting.add(candidate())
    closed = waiting.close("g", ahead, now_ns=10_000 * MS)

    assert closed is not None
    assert len(closed.members) == 4


def test_a_running_engine_is_refilled_at_once_when_enough_wait_for_its_free_rows() -> None:
    waiting = batcher(*(candidate() for _ in range(9)))

    closed = waiting.close("g", Capacity(free_rows=2, joins=True), now_ns=0)

    assert closed is not None
    assert (len(closed.members), closed.reason) == (2, CloseReason.JOIN)


def test_nothing_closes_while_the_engine_has_no_room() -> None:
    waiting = batcher(*(candidate() for _ in range(9)))

    assert waiting.close("g", Capacity(free_rows=0), now_ns=10_000 * MS) is None
    assert len(waiting) == 9


def test_a_job_of_several_sequences_is_never_split() -> None:
    first, second = candidate(num_sequences=3), candidate(arrived_ms=1, num_sequences=2)
    waiting = batcher(first, second)

    closed = waiting.close("g", IDLE, now_ns=2 * MS)

    assert closed is not None
    assert closed.members == (first,)
    assert closed.reason is CloseReason.SIZE


def test_order_is_priority_then_deadline_then_age() -> None:
    bulk = candidate(arrived_ms=0, priority=9)
    plain = candidate(arrived_ms=1)
    urgent = candidate(arrived_ms=2, deadline=1_000.0)
    more = [candidate(arrived_ms=3), candidate(arrived_ms=4)]
    waiting = batcher(bulk, plain, urgent, *more)

    closed = waiting.close("g", IDLE, now_ns=5 * MS)

    assert closed is not None
    assert closed.members == (urgent, plain, *more)


def test_a_starving_candidate_goes_first_whatever_its_priority() -> None:
    bulk = candidate(arrived_ms=0, priority=9)
    now = LIMITS.starvation_ns
    rush = [candidate(arrived_ms=now // MS, priority=0) for _ in range(8)]
    waiting = batcher(bulk, *rush)

    closed = waiting.close("g", IDLE, now_ns=now)

    assert closed is not None
    assert closed.members[0] == bulk


def test_a_patient_candidate_is_passed_over_by_sixteen_full_batches_and_no_more() -> None:
    # given
    patient, size = candidate(priority=9), LIMITS.max_batch_size
    waiting = batcher(patient)
    closed = []
    # when
    for _ in range(STARVATION_BATCHES + 1):
        for _ in range(size):
            waiting.add(candidate())
        closed.append(waiting.close("g", IDLE, now_ns=1 * MS))
    # then
    assert [patient in each.members for each in closed if each] == [
        *[False] * STARVATION_BATCHES,
        True,
    ]


def test_a_removed_candidate_is_never_admitted() -> None:
    gone, stays = candidate(), candidate()
    waiting = batcher(gone, stays)

    assert waiting.remove(gone.job_id) == gone
    assert waiting.remove(gone.job_id) is None
    closed = waiting.close("g", IDLE, now_ns=50 * MS)

    assert closed is not None
    assert closed.members == (stays,)


arrivals = st.lists(
    st.tuples(
        st.integers(0, 500),  # arrival, ms
        st.integers(1, 4),  # sequences
        st.integers(1, 500),  # prompt
        st.integers(1, 100),  # output
        st.integers(0, 9),  # priority
        st.sampled_from(["g", "other"]),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(arrivals, st.integers(1, 4))
def test_no_batch_ever_passes_a_limit_and_every_candidate_leaves_exactly_once(
    rows: list[tuple[int, int, int, int, int, str]], free_rows: int
) -> None:
    waiting = batcher()
    given_in = set()
    for arrived, sequences, prompt, output, priority, group in rows:
        each = candidate(
            arrived,
            num_sequences=min(sequences, free_rows),
            prompt_tokens=prompt,
            max_new_tokens=output,
            priority=priority,
            group=group,
        )
        given_in.add(each.job_id)
        waiting.add(each)

    came_out = []
    now = 1_000 * MS
    for group in ("g", "other"):
        while closed := waiting.close(group, Capacity(free_rows), now_ns=now):
            assert {member.group for member in closed.members} == {group}
            assert closed.num_sequences <= min(free_rows, LIMITS.max_batch_size)
            padded = closed.num_sequences * (
                max(m.prompt_tokens for m in closed.members)
                + max(m.max_new_tokens for m in closed.members)
            )
            assert padded <= LIMITS.max_batch_tokens or len(closed.members) == 1
            came_out += [member.job_id for member in closed.members]

    assert len(came_out) == len(set(came_out))
    assert set(came_out) == given_in
    assert len(waiting) == 0


def test_a_batch_stays_below_the_ceiling_of_its_longest_member() -> None:
    def ceiling(tokens: int) -> int:
        return 2 if tokens > 100 else 4

    long = [candidate(prompt_tokens=200) for _ in range(3)]
    capacity = Capacity(free_rows=4, ceiling=ceiling)

    closed = batcher(*long).close("g", capacity, now_ns=0)

    assert closed is not None
    assert closed.members == tuple(long[:2])
    assert closed.reason is CloseReason.SIZE


def test_a_job_over_the_ceiling_runs_alone_and_not_beside_others() -> None:
    big = candidate(num_sequences=3)

    def ceiling(tokens: int) -> int:
        return 1

    full = Capacity(free_rows=4, joins=True, ceiling=ceiling, is_empty=False)
    assert batcher(big).close("g", full, now_ns=GATHER_NS) is None
    closed = batcher(big).close("g", Capacity(4, ceiling=ceiling), now_ns=50 * MS)

    assert closed is not None
    assert closed.members == (big,)


@given(
    sizes=st.lists(st.integers(1, 12), max_size=20),
    lengths=st.lists(st.integers(1, 2_000), min_size=20, max_size=20),
    max_rows=st.integers(1, 8),
    joins=st.booleans(),
    ceiling=st.one_of(st.none(), st.integers(1, 8)),
    data=st.data(),
)
def test_no_candidate_waits_for_ever_behind_one_that_does_not_fit(
    sizes: list[int],
    lengths: list[int],
    max_rows: int,
    joins: bool,
    ceiling: int | None,
    data: st.DataObject,
) -> None:
    # given jobs of any sizes, and an engine that may take fewer rows than a batch may have
    waiting = batcher(
        *(
            candidate(num_sequences=size, prompt_tokens=length)
            for size, length in zip(sizes, lengths, strict=False)
        )
    )
    running: list[int] = []
    given_out = 0

    # when it runs what it is given, and a run ends whenever nothing goes in
    for _ in range(3 * len(sizes)):
        inside = sum(running)
        capacity = Capacity(
            max_rows - inside,
            joins=joins and inside > 0,
            ceiling=None if ceiling is None else lambda _, inside=inside: ceiling - inside,
            is_empty=inside == 0,
        )
        given_out += len(waiting.misfits("g", capacity))
        closed = waiting.close("g", capacity, now_ns=10**12)
        if closed is None:
            if not running:
                break
            running.remove(data.draw(st.sampled_from(running)))
            continue
        assert closed.num_sequences <= min(max_rows - inside, LIMITS.max_batch_size)
        running += [member.num_sequences for member in closed.members]
        given_out += len(closed.members)

    # then each has run or was refused
    assert (len(waiting), given_out) == (0, len(sizes))


def test_each_tenants_first_comes_before_anybodys_second() -> None:
    noisy = [candidate(arrived_ms=n, tenant="noisy") for n in range(8)]
    hasty = [candidate(arrived_ms=8 + n, tenant="hasty", deadline=1.0) for n in range(2)]
    lone = candidate(arrived_ms=10, tenant="lone")
    waiting = batcher(*noisy, *hasty, lone)

    closed = waiting.close("g", IDLE, now_ns=11 * MS)

    assert closed is not None
    assert set(closed.members) == {noisy[0], hasty[0], lone, hasty[1]}


def test_a_tenants_turn_is_within_its_priority() -> None:
    urgent = [candidate(tenant="noisy") for _ in range(4)]
    patient = candidate(tenant="lone", priority=1)
    waiting = batcher(patient, *urgent)

    closed = waiting.close("g", IDLE, now_ns=0)

    assert closed is not None
    assert set(closed.members) == set(urgent)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.integers(0, 20_000))))
@settings(max_examples=100, deadline=None)
def test_whatever_tenants_wait_those_of_one_keep_their_order(
    jobs: list[tuple[str, int, int]],
) -> None:
    waiting = batcher(
        *(candidate(arrived_ms=at, tenant=tenant, priority=step) for tenant, step, at in jobs)
    )
    taken: list[Candidate] = []
    while closed := waiting.close("g", IDLE, now_ns=20_100 * MS):
        taken += closed.members

    assert len(taken) == len(jobs)
    for tenant in "abc":
        own = [each for each in taken if each.tenant == tenant]
        starving = [each for each in own if 20_100 * MS - each.arrived_ns >= 10_000 * MS]
        fed = [each for each in own if each not in starving]
        assert own == [
            *sorted(starving, key=lambda each: each.arrived_ns),
            *sorted(fed, key=lambda each: (each.priority, each.arrived_ns)),
        ]


@given(
    came=st.lists(
        st.tuples(st.integers(0, 2), st.integers(-1, 9), st.sampled_from(["", "a", "b"])),
        max_size=12,
    ),
    free=st.integers(0, 6),
    joins=st.booleans(),
    is_ahead=st.booleans(),
    ceiling=st.none() | st.integers(0, 6),
    is_empty=st.booleans(),
)
def test_a_batch_is_foreseen_just_when_what_comes_would_fill_it_at_once_and_nobody_is_left(
    came: list[tuple[int, int, str]],
    free: int,
    joins: bool,
    is_ahead: bool,
    ceiling: int | None,
    is_empty: bool,
) -> None:
    # given whatever comes, each of one sequence and unknown length, and has waited for nobody yet
    arrived = [
        candidate(at_ms, priority=priority, tenant=tenant, prompt_tokens=0, max_new_tokens=0)
        for at_ms, priority, tenant in came
    ]
    most = None if ceiling is None else (lambda _: ceiling)
    capacity = Capacity(free, joins, most, is_empty, is_ahead)

    # when it is foreseen, or added
    foreseen = batcher().foresee("g", arrived, capacity, now_ns=2 * MS)
    closed = batcher(*arrived).close("g", capacity, now_ns=2 * MS)

    # then it is the same batch, or somebody would have to be chosen
    is_whole = closed is not None and len(closed.members) == len(arrived)
    assert foreseen == (closed if is_whole else None)
    assert closed is None or closed.reason in (CloseReason.SIZE, CloseReason.JOIN)


def test_nothing_is_foreseen_while_others_wait() -> None:
    waiting = batcher(candidate())

    assert waiting.foresee("g", [candidate() for _ in range(4)], IDLE, now_ns=0) is None


def test_what_is_foreseen_counts_as_taken_and_is_not_kept() -> None:
    foreseeing = batcher()

    assert foreseeing.foresee("g", [candidate() for _ in range(5)], IDLE, now_ns=0) is None
    assert foreseeing.foresee("g", [candidate() for _ in range(4)], IDLE, now_ns=0) is not None

    assert len(foreseeing) == 0
    assert foreseeing._num_taken["g"] == 4
