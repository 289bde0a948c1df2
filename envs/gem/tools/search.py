"""Search over a local collection: BM25 in pure Python, and the tool that asks it.

score(q, d) = sum over terms t of q:  idf(t) * f * (k1 + 1) / (f + k1 * (1 - b + b * |d| / avg|d|)),   f = count of t in d,
idf(t) = ln(1 + (N - n + 0.5) / (n + 0.5)),   N documents, n of them with t.   (Robertson and Zaragoza 2009; the idf is Lucene's, never negative.)
"""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from envs.gem.tools.base import BaseTool, ToolResult

_TERM = re.compile(r"\w+")
OPEN, CLOSE = "<search>", "</search>"
MAX_QUERY_TERMS = 256  # of a model's query; a longer one is cut


def terms(text: str) -> list[str]:
    """Words and numbers, case folded."""
    return _TERM.findall(text.casefold())


class BM25Index:
    """An inverted index over (title, text) pairs; a title's words count like the text's.

    Read-only once built, so threads may share it.
    """

    def __init__(
        self, documents: Iterable[tuple[str, str]], k1: float = 1.2, b: float = 0.75
    ) -> None:
        self.documents = list(documents)
        self._postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
        counts = [Counter(terms(f"{title}\n{text}")) for title, text in self.documents]
        lengths = [sum(count.values()) for count in counts]
        mean = sum(lengths) / len(lengths) if any(lengths) else 1.0
        found_in = Counter(term for count in counts for term in count)
        for index, count in enumerate(counts):
            norm = k1 * (1 - b + b * lengths[index] / mean)
            for term, f in count.items():
                n = found_in[term]
                idf = math.log(1 + (len(counts) - n + 0.5) / (n + 0.5))
                self._postings[term].append((index, idf * f * (k1 + 1) / (f + norm)))

    def search(self, query: str, topk: int = 3) -> list[tuple[int, float]]:
        """(position of the document, score) of the best, best first; only documents that share a
        term.

        Equal scores: the earlier one first.
        """
        scores: dict[int, float] = defaultdict(float)
        for term in terms(query)[:MAX_QUERY_TERMS]:
            for index, score in self._postings.get(term, ()):
                scores[index] += score
        return heapq.nsmallest(topk, scores.items(), key=lambda item: (-item[1], item[0]))


class SearchTool(BaseTool):
    """Answers the first `<search>query</search>` of a turn with the best documents between
    <information> tags.
    """

    tool_type = "search"

    def __init__(self, index: BM25Index, topk: int = 3) -> None:
        super().__init__()
        self.index, self.topk = index, topk

    def instruction_string(self) -> str:
        return (
            "You can search a collection of documents before you answer. Write <search> your query"
            " </search>; the results come back between <information> and </information>. Search as"
            " often as you need, then give your final answer as <answer> your answer </answer>."
        )

    def execute_action(self, action: str) -> ToolResult:
        start = action.find(OPEN)
        end = action.find(CLOSE, start) if start >= 0 else -1
        if end < 0:
            return False, True, "", ""
        found = self.index.search(action[start + len(OPEN) : end], self.topk)
        lines = [
            f"Doc {rank}(Title: {title}) {text}\n"
            for rank, (title, text) in enumerate(
                (self.index.documents[i] for i, _ in found), start=1
            )
        ]
        return (
            True,
            False,
            f"\n\n<information>{''.join(lines) or 'No document matches.'}</information>\n\n",
            action[: end + len(CLOSE)],
        )
