"""How upstreams share requests, and how their limits are found; on a clock of the test's own."""

from __future__ import annotations

import heapq
from datetime import UTC, datetime
from email.utils import format_datetime

from hypothesis import given
from hypothesis import strategies as st

from app.engines.openai.answer import asked_s
from app.engines.openai.balance import LONGEST_ASKED_S, LONGEST_PAUSE_S, Load, choose

S = 1_000_000_000


@given(bears=st.integers(1, 60), most=st.integers(1, 100))
def test_a_limit_settles_where_the_servers_own_is(bears: int, most: int) -> None:
    # given a server that refuses whatever is beyond what it bears, and answers in a second
    load, now_ns = Load(1.0, most), 0
    running: list[tuple[int, int]] = []
    refused = answered = 0
    for _ in range(4_000):
        while load.has_room(now_ns):
            load.begin(alone=False)
            if len(running) >= bears:
                load.overloaded(now_ns, now_ns, None)
                load.end()
                refused += 1
            else:
                heapq.heappush(running, (now_ns + S, now_ns))
        later = load.resumes_ns if load.resumes_ns > now_ns and not running else 0
        if running:
            now_ns = heapq.heappop(running)[0]
            load.end()
            load.succeeded()
            answered += 1
        now_ns = max(now_ns, later)

    # then few are refused, and the server is kept at least half busy
    assert refused <= answered / 4
    assert answered / (now_ns / S) >= 0.4 * min(bears, most)
    assert 1 <= load.limit <= most


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["begin", "succeeded", "overloaded", "failed", "wait"]),
            st.floats(0, 2000),
        ),
        max_size=80,
    ),
    st.integers(1, 50),
)
def test_whatever_happens_a_server_is_asked_again_and_never_by_more_than_allowed(
    moves: list[tuple[str, float]], most: int
) -> None:
    load, now_ns = Load(1.0, most), 0
    begun: list[int] = []
    for move, amount in moves:
        if move == "wait":
            now_ns += int(amount * S)
        elif move == "begin":
            if load.has_room(now_ns):
                load.begin(alone=False)
                begun.append(now_ns)
        elif begun:
            began_ns = begun.pop(0)
            match move:
                case "succeeded":
                    load.succeeded()
                case "overloaded":
                    load.overloaded(began_ns, now_ns, amount)
                case "failed":
                    load.failed(now_ns)
            load.end()
        assert 0 <= load.inside <= most
    while begun:
        begun.pop()
        load.end()

    longest_s = max(LONGEST_ASKED_S, LONGEST_PAUSE_S)
    assert load.has_room(now_ns + int(longest_s * S) + 1)


def test_many_refusals_of_one_moment_halve_a_limit_once() -> None:
    load = Load(1.0, 100, limit=64, inside=64)

    for number in range(64):
        load.overloaded(10, 20 + number, 1.0)

    assert load.limit == 32


def test_after_a_failure_one_request_finds_out_for_all_others() -> None:
    load = Load(1.0, 100)
    load.failed(0)
    assert not load.has_room(S // 4)
    assert load.has_room(S)
    load.begin(alone=False)
    assert not load.has_room(S)

    load.end()
    load.succeeded()

    assert load.has_room(S)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5))
def test_requests_go_to_upstreams_by_their_weights(weights: list[int]) -> None:
    loads = [Load(float(weight), 10_000, limit=10_000) for weight in weights]

    for _ in range(20 * sum(weights)):
        chosen = choose(loads, 0)
        assert chosen is not None
        chosen.begin(alone=False)

    for load, weight in zip(loads, weights, strict=True):
        assert abs(load.inside - 20 * weight) <= 20


def test_a_request_that_is_to_be_alone_gets_an_empty_upstream_and_nobody_beside_it() -> None:
    busy, empty = Load(9.0, 8, inside=1), Load(1.0, 8)

    chosen = choose([busy, empty], 0, alone=True)
    assert chosen is empty
    empty.begin(alone=True)

    assert choose([busy, empty], 0, alone=True) is None
    assert choose([busy, empty], 0) is busy
    empty.end()
    assert choose([busy, empty], 0, alone=True) is empty


NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@given(st.text() | st.floats().map(str) | st.datetimes().map(format_datetime))
def test_no_retry_after_header_is_too_odd(text: str) -> None:
    seconds = asked_s(text, NOW)

    assert seconds is None or seconds >= 0


def test_retry_after_is_read_as_seconds_and_as_a_date() -> None:
    assert asked_s("2.5", NOW) == 2.5
    assert asked_s("Fri, 02 Jan 2026 03:05:05 GMT", NOW) == 60
    assert asked_s("Fri, 02 Jan 2026 03:03:05 GMT", NOW) is None
    assert asked_s(None, NOW) is None
    assert asked_s("inf", NOW) is None
