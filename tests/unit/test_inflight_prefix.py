"""The tree of prompt beginnings: what is shared, what is copied, what is given up."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from app.engines.inflight.cache import BLOCK, blocks_for
from app.engines.inflight.prefix import WORTH_WAITING, Node, PrefixCache

_PROMPT = tuple(range(3 * BLOCK + 8))


def test_a_prompt_uses_whole_blocks_and_copies_what_follows() -> None:
    cache = PrefixCache()
    _compute(cache, "a", _PROMPT, blocks=[10, 11, 12, 13])

    match = cache.match("a", (*_PROMPT[: 2 * BLOCK + 5], 999, 998))

    assert [node.block for node in match.nodes] == [10, 11]
    assert match.partial is not None
    assert match.partial.block == 12
    assert match.num_tokens == 2 * BLOCK + 5
    assert not match.worth_waiting


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    cache = PrefixCache()
    _compute(cache, "a", _PROMPT, blocks=[10, 11, 12, 13])

    assert cache.match("a", _PROMPT).num_tokens == len(_PROMPT) - 1
    assert cache.match("a", _PROMPT[: 2 * BLOCK]).num_tokens == 2 * BLOCK - 1


def test_tenants_share_nothing() -> None:
    cache = PrefixCache()
    _compute(cache, "a", _PROMPT, blocks=[10, 11, 12, 13])

    assert cache.match("b", _PROMPT).num_tokens == 0


def test_of_many_alike_the_longest_beginning_is_found() -> None:
    cache = PrefixCache()
    for place in range(50):
        own = (*range(5), *range(1000, 1000 + place), 2000 + place)
        _compute(cache, "a", own[:BLOCK], blocks=[100 + place])

    match = cache.match("a", (*range(5), *range(1000, 1020), 7))

    assert match.num_tokens == 25


def test_a_prompt_waits_for_a_beginning_that_is_being_computed() -> None:
    # given
    cache = PrefixCache()
    nodes = cache.publish("a", _PROMPT, [], [1, 2, 3, 4])

    # when nothing of it is there
    match = cache.match("a", _PROMPT)

    # then
    assert match.worth_waiting
    assert match.num_tokens == 0

    # when nearly all of the first block is there
    nodes[0].ready = BLOCK - WORTH_WAITING + 1
    match = cache.match("a", (*_PROMPT[:BLOCK], 999, 999))

    # then the rest is not worth a wait
    assert not match.worth_waiting
    assert match.num_tokens == BLOCK - WORTH_WAITING + 1


def test_a_cancelled_row_leaves_what_it_has_computed() -> None:
    cache = PrefixCache()
    nodes = cache.publish("a", _PROMPT, [], [1, 2, 3, 4])
    nodes[0].ready, nodes[1].ready = BLOCK, 7

    freed = cache.release(nodes)

    assert sorted(freed) == [3, 4]
    assert cache.num_idle == 2
    assert cache.match("a", _PROMPT).num_tokens == BLOCK + 7


def test_the_block_unused_for_longest_is_given_up_first_and_leaves_before_their_parents() -> None:
    # given two prompts with a first block in common, and one of the two used again
    cache = PrefixCache()
    _compute(cache, "a", _PROMPT[: 2 * BLOCK], blocks=[1, 2])
    other = (*_PROMPT[:BLOCK], *range(500, 500 + BLOCK))
    first = cache.match("a", other).nodes
    cache.use(first)
    added = cache.publish("a", other, first, [1, 3])
    _fill(added)
    cache.release([*first, *added])
    again = cache.match("a", (*_PROMPT[: 2 * BLOCK], 0)).nodes
    cache.use(again)
    cache.release(again)

    # then
    assert [cache.evict() for _ in range(4)] == [3, 2, 1, None]


def test_a_block_in_use_is_never_given_up() -> None:
    cache = PrefixCache()
    _fill(cache.publish("a", _PROMPT, [], [1, 2, 3, 4]))

    assert cache.evict() is None


def test_a_tenant_without_blocks_is_forgotten() -> None:
    cache = PrefixCache()
    _compute(cache, "a", _PROMPT[:BLOCK], blocks=[1])
    assert "a" in cache._roots

    assert cache.evict() == 1

    assert "a" not in cache._roots


def _compute(cache: PrefixCache, tenant: str, prompt: Seq[int], blocks: list[int]) -> None:
    """A row computes a prompt and leaves."""
    assert len(blocks) == blocks_for(len(prompt))
    nodes = cache.publish(tenant, prompt, [], blocks)
    _fill(nodes)
    cache.release(nodes)


def _fill(nodes: list[Node]) -> None:
    for node in nodes:
        node.ready = len(node.tokens)
