"""The search tool, against BM25 computed otherwise."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.gem.tools import BM25Index, SearchTool
from envs.gem.tools.search import terms

DOCUMENTS = [
    ("cats", "the cat sat on the mat"),
    ("dogs", "the dog chased the cat, the cat ran"),
    ("physics", "energy equals mass"),
    ("empty", ""),
    ("cats", "cat"),
]


@settings(deadline=None)
@given(
    documents=st.lists(
        st.tuples(st.sampled_from(["a", "b c", ""]), st.text("abc ", max_size=12)),
        min_size=1,
        max_size=6,
    ),
    query=st.text("abcd ", max_size=8),
)
def test_scores_are_bm25(documents, query):
    bags = [terms(f"{title}\n{text}") for title, text in documents]
    mean = sum(map(len, bags)) / len(bags) or 1.0

    def score(bag):
        total = 0.0
        for term in terms(query):
            n = sum(term in other for other in bags)
            f = bag.count(term)
            total += (
                math.log(1 + (len(bags) - n + 0.5) / (n + 0.5))
                * f
                * 2.2
                / (f + 1.2 * (0.25 + 0.75 * len(bag) / mean))
                if f
                else 0.0
            )
        return total

    matching = [
        (index, score(bag)) for index, bag in enumerate(bags) if set(bag) & set(terms(query))
    ]
    expected = sorted(matching, key=lambda item: (-round(item[1], 9), item[0]))
    found = BM25Index(documents).search(query, topk=10)
    assert sorted(index for index, _ in found) == sorted(index for index, _ in expected)
    assert [round(value, 9) for _, value in found] == pytest.approx(
        [round(value, 9) for _, value in expected]
    )


def test_search_answers_in_gems_form():
    tool = SearchTool(BM25Index(DOCUMENTS), topk=2)
    found, failed, observation, parsed = tool.execute_action(
        "think <search> Dog CHASED </search> more"
    )
    assert (found, failed, parsed) == (True, False, "think <search> Dog CHASED </search>")
    assert (
        observation == "\n\n<information>Doc 1(Title: dogs) the dog chased the cat, the cat"
        " ran\n</information>\n\n"
    )
    assert "No document matches." in tool.execute_action("<search>zebra</search>")[2]
    assert tool.execute_action("<search></search>")[0] is True
    assert BM25Index([]).search("anything") == []
