"""Who holds which page, and which go first."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rome.serve.pages import PageTable

P = 2


def put(table, ids, kind="a"):
    """Keep a sequence's pages, as a request does that computes it alone and ends."""
    node, path = table.root(kind), []
    for start in range(0, len(ids), P):
        node = table.add(node, tuple(ids[start : start + P]), table.take(), None)
        table.hold(node)
        path.append(node)
    table.let_go(path)
    return [node.page for node in path]


def found(table, ids, kind="a"):
    node, pages = table.root(kind), []
    for start in range(0, len(ids), P):
        node = table.find(node, ids, start)
        if node is None:
            break
        pages.append(node.page)
    return pages


def test_sequences_that_begin_alike_share_their_pages():
    table = PageTable(9, P)
    first = put(table, [1, 2, 3, 4])
    second = put(table, [1, 2, 5, 6])
    assert first[0] == second[0] and first[1] != second[1]
    assert table.available == 9
    assert found(table, [1, 2, 3, 4, 9, 9]) == first and found(table, [5, 6]) == []


def test_a_page_stands_for_all_tokens_before_it_and_for_one_kind():
    table = PageTable(9, P)
    put(table, [1, 2, 3, 4])
    assert found(table, [3, 4]) == [] and found(table, [1, 2], kind="b") == []


def test_the_least_recently_used_leaf_goes_first_and_a_prefix_after_what_follows_it():
    table = PageTable(4, P)
    old = put(table, [1, 2, 3, 4])
    put(table, [5, 6])
    put(table, [7, 8])
    assert [table.take(), table.take()] == [old[1], old[0]]
    assert found(table, [5, 6]) and found(table, [7, 8])


def test_a_page_that_is_held_is_never_taken():
    table = PageTable(2, P)
    put(table, [1, 2, 3, 4])
    held = table.find(table.root("a"), [1, 2], 0)
    table.hold(held)
    assert table.available == 1
    assert table.take() != held.page and table.take() is None
    table.let_go([held])
    assert table.take() == held.page


def test_the_end_of_a_sequence_is_taken_by_one_that_goes_on_from_there():
    table = PageTable(4, P)
    pages = put(table, [1, 2, 3])
    last = table.find(table.root("a"), [1, 2], 0)
    assert table.take_partial(last, [1, 2, 4, 5], 2, 3) is None
    assert table.take_partial(last, [1, 2, 3, 5], 2, 3).page == pages[1]
    assert table.take_partial(last, [1, 2, 3, 5], 2, 3) is None


class Tree(RuleBasedStateMachine):
    """Requests come, compute, and go, in any order."""

    COUNT = 7

    def __init__(self):
        super().__init__()
        self.table = PageTable(self.COUNT, P)
        self.open = []

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=6), kind=st.sampled_from("ab"))
    def begin(self, ids, kind):
        root = node = self.table.root(kind)
        path = []
        for start in range(0, len(ids) - P, P):
            node = self.table.find(node, ids, start)
            if node is None:
                break
            self.table.hold(node)
            path.append(node)
        self.open.append((root, ids, path, []))

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 99))
    def compute_a_page(self, which):
        root, ids, path, own = self.open[which % len(self.open)]
        start = len(path) * P
        page = self.table.take()
        if page is None:
            return
        if start + P > len(ids):
            own.append(page)
            return
        last = path[-1] if path else root
        node = self.table.add(last, tuple(ids[start : start + P]), page, None)
        self.table.hold(node)
        path.append(node)

    @precondition(lambda self: self.open)
    @rule(which=st.integers(0, 99))
    def end(self, which):
        root, ids, path, own = self.open.pop(which % len(self.open))
        tail = tuple(ids[len(path) * P :])
        if own and 0 < len(tail) < P:
            self.table.add(path[-1] if path else root, tail, own.pop(), None)
        self.table.give_back(own)
        self.table.let_go(path)

    @invariant()
    def every_page_is_in_one_place(self):
        table = self.table
        in_tree = []
        nodes = list(table._roots.values())
        while nodes:
            node = nodes.pop()
            nodes += node.children.values()
            if node.parent is not None:
                in_tree.append(node)
        private = [page for *_, own in self.open for page in own]
        places = [node.page for node in in_tree] + table._free + private
        assert sorted(places) == list(range(self.COUNT))
        unheld = [node for node in in_tree if node.holders == 0]
        assert table.available == len(table._free) + len(unheld)
        assert {*table._leaves} == {node for node in unheld if not node.children}
        for node in in_tree:
            holders = sum(path.count(node) for _, _, path, _ in self.open)
            assert node.holders == holders


TestTree = Tree.TestCase
TestTree.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_routes_stay_with_their_page():
    table = PageTable(2, P)
    routes = np.arange(4)
    node = table.add(table.root("a"), (1, 2), table.take(), routes)
    assert table.find(table.root("a"), [1, 2], 0) is node and node.routes is routes
