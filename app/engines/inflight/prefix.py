"""Prompts that begin alike share the cache blocks of what they have in common.

A tree for each tenant: a node is one block of tokens after its parent's. Rows that use a node keep
it; a node that nobody uses stays until its block is needed, least recently used first. Only the
last node of a path may be shorter than a block. What two prompts share beyond their last common
block is copied, so that reuse is exact to the token. A row that leaves adds what it generated: the
next turn of a chat begins with it.

A node is known before it is computed. A prompt that would gain from a node in the making is told
to wait, so that prompts which arrive together compute what they share once; what of it is computed
is ready for all with the step that computed it. What a row computed that came to no number is lost:
nobody else begins with it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakValueDictionary

from app.engines.inflight.cache import BLOCK, blocks_for

WORTH_WAITING: Final = 16
"""Tokens. For less than this a prompt does not wait until somebody else has computed them."""


@dataclass(slots=True, weakref_slot=True, eq=False)
class Node:
    parent: Node | None
    tokens: tuple[int, ...]  #: at most BLOCK
    block: int
    ready: int = 0  #: leading tokens that others may use: they are computed
    users: int = 0
    priority: int = 0  #: of who computes it
    is_sound: bool = False  #: it has led to a token
    is_lost: bool = False  #: it is in the tree no more; its users give it up
    children: list[Node] = field(default_factory=list)  #: sorted by tokens: likes are neighbours


@dataclass(frozen=True, slots=True)
class Match:
    """What the cache holds of a prompt's beginning."""

    nodes: list[Node]  #: whole blocks, to be used as they are
    partial: Node | None  #: begins like what follows; to be copied
    partial_tokens: int
    worth_waiting: bool  #: somebody computes more of it right now

    @property
    def num_tokens(self) -> int:
        return len(self.nodes) * BLOCK + self.partial_tokens


class PrefixCache:
    """Owns the trees and the order in which unused blocks are given up."""

    def __init__(self, least_copied: int = 1) -> None:
        self._least_copied = least_copied
        # A root lives as long as it has children: each of them holds its parent.
        self._roots: WeakValueDictionary[str, Node] = WeakValueDictionary()
        self._idle: OrderedDict[Node, None] = OrderedDict()  # a parent always after its children

    @property
    def num_idle(self) -> int:
        """Blocks that `evict` could free."""
        return len(self._idle)

    def match(self, tenant: str, tokens: Seq[int], priority: int = 0) -> Match:
        """The longest known beginning of a prompt; always short of its last token, whose output
        somebody has to compute. It waits for nobody of a lower priority, who may have to wait."""
        node, usable = self._root(tenant), len(tokens) - 1
        nodes: list[Node] = []
        while True:
            wanted = tuple(tokens[len(nodes) * BLOCK : (len(nodes) + 1) * BLOCK])
            child, common = _most_alike(node.children, wanted)
            common = min(common, usable - len(nodes) * BLOCK)
            if child is None or common <= 0:
                return Match(nodes, None, 0, False)
            ready = min(common, child.ready)
            if ready < BLOCK:
                waits = common - ready >= WORTH_WAITING and child.priority <= priority
                if ready < self._least_copied:
                    return Match(nodes, None, 0, waits)
                return Match(nodes, child, ready, waits)
            nodes.append(child)
            node = child

    def use(self, nodes: Seq[Node]) -> None:
        for node in nodes:
            node.users += 1
            self._idle.pop(node, None)

    def publish(
        self,
        tenant: str,
        tokens: Seq[int],
        nodes: Seq[Node],
        blocks: Seq[int],
        priority: int = 0,
    ) -> list[Node]:
        """Add a prompt's blocks after the `nodes` it uses; its row is their first user.

        Stops where the tree already has the very block: that stays the row's own.
        """
        parent = nodes[-1] if nodes else self._root(tenant)
        added: list[Node] = []
        for place in range(len(nodes), len(blocks)):
            part = tuple(tokens[place * BLOCK : (place + 1) * BLOCK])
            like, common = _most_alike(parent.children, part)
            if not part or (like is not None and common == len(part)):
                break
            parent = self._add(parent, part, blocks[place])
            parent.priority = priority
            added.append(parent)
        return added

    def leave(self, tenant: str, tokens: Seq[int], nodes: Seq[Node], blocks: Seq[int]) -> list[int]:
        """A row that has computed `tokens` leaves its `blocks`, the first of which are those of its
        `nodes`. Blocks that are not kept for later come back free."""
        used = list(nodes)
        if any(node.is_lost or node.ready < len(node.tokens) for node in used):
            return [*blocks[len(used) :], *self.release(used)]
        if used and len(used[-1].tokens) < BLOCK:  # nobody else uses it: it may have grown
            self._remove(used.pop())
        parent = used[-1] if used else self._root(tenant)
        num_computed = max(len(used), blocks_for(len(tokens)))
        free = list(blocks[num_computed:])
        for place in range(len(used), num_computed):
            part = tuple(tokens[place * BLOCK : (place + 1) * BLOCK])
            like, common = _most_alike(parent.children, part)
            if like is not None and common == len(part):
                if min(common, like.ready) < BLOCK:  # somebody has as much, or is about to
                    free += blocks[place:num_computed]
                    break
                free.append(blocks[place])
                self.use([like])
                parent = like
            else:
                parent = self._add(parent, part, blocks[place])
                parent.ready, parent.is_sound = len(part), True
            used.append(parent)
        return free + self.release(used)

    def lose(self, nodes: Seq[Node]) -> list[int]:
        """What a row computed came to no number: nobody is to begin with it, nor with what follows
        it, unless it has led to a token before. Blocks that nobody uses come back free."""
        lost = [node for node in nodes if not (node.is_sound or node.is_lost)][:1]
        freed: list[int] = []
        for node in lost:
            self._detach(node)
        while lost:
            node = lost.pop()
            node.is_lost = True
            if node in self._idle:
                del self._idle[node]
                freed.append(node.block)
            lost += node.children
            node.children = []
        return freed

    def release(self, nodes: Seq[Node]) -> list[int]:
        """Blocks that were not computed come back free."""
        freed: list[int] = []
        for node in reversed(nodes):
            node.users -= 1
            if node.users:
                continue
            if node.ready and not node.is_lost:
                self._shorten(node)
                self._idle[node] = None
            else:
                if not node.is_lost:
                    self._remove(node)
                freed.append(node.block)
        return freed

    def _add(self, parent: Node, tokens: tuple[int, ...], block: int) -> Node:
        """A node in the tree, with one user."""
        node = Node(parent, tokens, block, users=1)
        insort(parent.children, node, key=_tokens)
        return node

    def evict(self) -> int | None:
        """Give up the block that was not used for the longest time; None if all are in use."""
        if not self._idle:
            return None
        node, _ = self._idle.popitem(last=False)
        self._remove(node)
        return node.block

    def _root(self, tenant: str) -> Node:
        return self._roots.setdefault(tenant, Node(None, (), -1))

    def _shorten(self, node: Node) -> None:
        """Forget the tokens that a cancelled row never computed."""
        if node.ready < len(node.tokens):
            self._remove(node)
            node.tokens = node.tokens[: node.ready]
            assert node.parent is not None
            insort(node.parent.children, node, key=_tokens)

    def _remove(self, node: Node) -> None:
        assert not node.children
        self._detach(node)

    def _detach(self, node: Node) -> None:
        assert node.parent is not None
        siblings = node.parent.children
        place = bisect_left(siblings, node.tokens, key=_tokens)
        while siblings[place] is not node:
            place += 1
        del siblings[place]


def _tokens(node: Node) -> tuple[int, ...]:
    return node.tokens


def _most_alike(nodes: Seq[Node], tokens: tuple[int, ...]) -> tuple[Node | None, int]:
    """The node that has the most leading tokens in common, and how many: a neighbour in order."""
    place = bisect_left(nodes, tokens, key=_tokens)
    best, most = None, 0
    for node in nodes[max(0, place - 1) : place + 1]:
        common = _common(node.tokens, tokens)
        if common > most:
            best, most = node, common
    return best, most


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    for count, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return count
    return min(len(a), len(b))
