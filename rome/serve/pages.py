"""The pages of the cache: which are free, and which prefixes the others hold.

A page holds the keys and values of some following tokens of one sequence. Pages whose tokens are
all computed are kept in a tree: a node's children are the pages that may follow it, found by their
tokens, so a path from a root is a prefix. Sequences that begin alike share its pages; a request
holds the nodes of its path. What nobody holds stays until its memory is needed: leaves go first,
the least recently used one before the others.

A sequence that ends inside of a page leaves it as a leaf with fewer tokens. One request that goes
on from there takes such a page out of the tree and fills it up.
"""

from __future__ import annotations

import collections
import dataclasses
import weakref
from collections.abc import Hashable, Sequence

import numpy as np

Tokens = tuple[int, ...]


@dataclasses.dataclass(eq=False)
class Node:
    """One page of the tree; a root has none.

    Attributes:
      page: its number; -1 for a root.
      tokens: in it, as many as a page has positions, or fewer.
      parent: None for a root.
      children: the pages that follow, by their tokens.
      holders: requests that use it now.
      used: when it was let go last, in calls of `let_go`.
      routes: experts of its tokens, [tokens, layers, k]; None where nobody asked for them.
    """

    page: int
    tokens: Tokens = ()
    parent: Node | None = None
    children: dict[Tokens, Node] = dataclasses.field(default_factory=dict)
    holders: int = 0
    used: int = 0
    routes: np.ndarray | None = None


class PageTable:
    """Pages 0 ... count - 1, each of `positions` tokens."""

    def __init__(self, count: int, positions: int):
        self.count = count
        self.positions = positions
        self._free = list(range(count - 1, -1, -1))
        # A root lives as long as a page of it or a request that began there.
        self._roots: weakref.WeakValueDictionary[Hashable, Node] = weakref.WeakValueDictionary()
        # Nodes that nobody holds and no page follows, least recently used first; an ordered set.
        self._leaves: collections.OrderedDict[Node, None] = collections.OrderedDict()
        self._unheld = 0
        self._clock = 0

    @property
    def available(self) -> int:
        """Number of pages that are free or that nobody holds."""
        return len(self._free) + self._unheld

    def root(self, kind: Hashable) -> Node:
        """Return the root of the prefixes of one kind; kinds share nothing."""
        return self._roots.setdefault(kind, Node(-1))

    def find(self, node: Node, ids: Sequence[int], start: int) -> Node | None:
        """Return the full page that follows `node` and holds ids from `start` on, or None."""
        return node.children.get(tuple(ids[start : start + self.positions]))

    def hold(self, node: Node) -> None:
        """Count one more request that uses this page."""
        node.holders += 1
        if node.holders == 1:
            self._unheld -= 1
            self._leaves.pop(node, None)

    def let_go(self, path: Sequence[Node]) -> None:
        """Count one request less for each page of a path, given from the root on."""
        self._clock += 1
        for node in path:
            node.holders -= 1
            node.used = self._clock
            if node.holders == 0:
                self._unheld += 1
                self._note_leaf(node)

    def take_partial(self, node: Node, ids: Sequence[int], start: int, end: int) -> Node | None:
        """Take the fullest page after `node` that holds ids[start:...] out of the tree.

        Args:
          node: the last page before.
          ids: of the sequence.
          start: where the page begins in it.
          end: the page must hold fewer than ids[start:end].
        """
        longest = min(self.positions - 1, end - start)
        for length in range(longest, 0, -1):
            found = node.children.get(tuple(ids[start : start + length]))
            if found is not None and found.holders == 0:
                self._remove(found)
                return found
        return None

    def take(self) -> int | None:
        """Return a page to write to, or None where every page is in use."""
        if self._free:
            return self._free.pop()
        if not self._leaves:
            return None
        oldest = next(iter(self._leaves))
        self._remove(oldest)
        return oldest.page

    def give_back(self, pages: Sequence[int]) -> None:
        """Free pages that are not in the tree."""
        self._free.extend(pages)

    def add(self, node: Node, tokens: Tokens, page: int, routes: np.ndarray | None) -> Node:
        """Return the node after `node` for these tokens; nobody holds it yet because of this call.

        Where another sequence has put the same tokens there before, that page is kept and `page`
        is free again: both hold the same numbers.
        """
        found = node.children.get(tokens)
        if found is not None:
            self._free.append(page)
            return found
        new = Node(page, tokens, node, used=self._clock, routes=routes)
        node.children[tokens] = new
        self._leaves.pop(node, None)
        self._unheld += 1
        self._note_leaf(new)
        return new

    def forget_all(self) -> None:
        """Drop all prefixes; no request holds one."""
        self._free = list(range(self.count - 1, -1, -1))
        self._roots.clear()
        self._leaves.clear()
        self._unheld = 0

    def _note_leaf(self, node: Node) -> None:
        if node.holders == 0 and not node.children and node.parent is not None:
            self._leaves[node] = None

    def _remove(self, leaf: Node) -> None:
        """Take a leaf that nobody holds out of the tree; its page belongs to the caller."""
        assert leaf.parent is not None and leaf.holders == 0 and not leaf.children
        del self._leaves[leaf]
        self._unheld -= 1
        parent = leaf.parent
        del parent.children[leaf.tokens]
        self._note_leaf(parent)
        if parent in self._leaves and parent.used <= leaf.used:
            self._leaves.move_to_end(parent, last=False)  # as long unused as the leaf
