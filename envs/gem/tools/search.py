"""Search over a local collection: a BM25 index in pure Python, and the tool that asks it.

The score of a document d for a query q sums over the terms t of q:

    idf(t) * f * (k1 + 1) / (f + k1 * (1 - b + b * |d| / avg|d|)),  f = number of t in d
    idf(t) = ln(1 + (N - n + 0.5) / (n + 0.5)),  N documents, n of them with t

(Robertson and Zaragoza 2009; the idf is Lucene's, which is never negative).
"""

from __future__ import annotations

import heapq
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from envs.gem.tool_call import read_turn
from envs.gem.tools.base import BaseTool, ToolResult

OPEN = "<search>"
CLOSE = "</search>"
MAX_QUERY_TERMS = 256  # of a model's query; a longer one is cut
_TERM = re.compile(r"\w+")


def terms(text: str) -> list[str]:
    """Return the words and numbers of a text, case folded."""
    return _TERM.findall(text.casefold())


class BM25Index:
    """An inverted index over documents. It is read-only once built, so threads may share it.

    Args:
      documents: (title, text) pairs; the words of both count alike.
      k1: how much repetitions of a term count.
      b: how much long documents are penalised, from 0 to 1.
    """

    def __init__(
        self, documents: Iterable[tuple[str, str]], k1: float = 1.2, b: float = 0.75
    ) -> None:
        self.documents = list(documents)
        counts = [Counter(terms(f"{title}\n{text}")) for title, text in self.documents]
        self._postings = _score_terms(counts, k1, b)

    def search(self, query: str, topk: int = 3) -> list[tuple[int, float]]:
        """Return the best documents that share a term with the query, best first.

        Args:
          query: any text.
          topk: at most so many documents.

        Returns:
          (position of the document, score); of equal scores the earlier document first.
        """
        scores: dict[int, float] = defaultdict(float)
        for term in terms(query)[:MAX_QUERY_TERMS]:
            for position, score in self._postings.get(term, ()):
                scores[position] += score
        return heapq.nsmallest(topk, scores.items(), key=_best_first)


def _score_terms(
    counts: list[Counter[str]], k1: float, b: float
) -> dict[str, list[tuple[int, float]]]:
    """Return for each term the documents that have it, as (position, the term's score there)."""
    lengths = [sum(count.values()) for count in counts]
    mean_length = _mean(lengths)
    containing = _count_documents(counts)
    postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for position, count in enumerate(counts):
        length_norm = k1 * (1 - b + b * lengths[position] / mean_length)
        for term, frequency in count.items():
            idf = _idf(len(counts), containing[term])
            score = idf * frequency * (k1 + 1) / (frequency + length_norm)
            postings[term].append((position, score))
    return postings


def _mean(lengths: list[int]) -> float:
    """Return the mean length; 1 where there are no words at all."""
    return sum(lengths) / len(lengths) if any(lengths) else 1.0


def _count_documents(counts: list[Counter[str]]) -> Counter[str]:
    """Return for each term the number of documents that have it."""
    documents: Counter[str] = Counter()
    for count in counts:
        documents.update(count.keys())
    return documents


def _idf(documents: int, containing: int) -> float:
    return math.log(1 + (documents - containing + 0.5) / (containing + 0.5))


def _best_first(found: tuple[int, float]) -> tuple[float, int]:
    position, score = found
    return -score, position


class SearchTool(BaseTool):
    """A tool that answers `<search>query</search>` with documents in <information> tags.

    Only the first search of a turn is run.

    Args:
      index: the collection.
      topk: number of documents to show.
    """

    tool_type = "search"

    def __init__(self, index: BM25Index, topk: int = 3) -> None:
        super().__init__()
        self.index = index
        self.topk = topk

    def instruction_string(self) -> str:
        return (
            "You can search a collection of documents before you answer. Write <search> your query"
            " </search>; the results come back between <information> and </information>. Search as"
            " often as you need, then give your final answer as <answer> your answer </answer>."
        )

    def execute_action(self, action: str) -> ToolResult:
        start = action.find(OPEN, read_turn(action).start)
        end = action.find(CLOSE, start) if start >= 0 else -1
        if end < 0:
            return False, True, "", ""
        query = action[start + len(OPEN) : end]
        parsed_action = action[: end + len(CLOSE)]
        found = self.index.search(query, self.topk)
        lines = []
        for rank, (position, _) in enumerate(found, start=1):
            title, text = self.index.documents[position]
            lines.append(f"Doc {rank}(Title: {title}) {text}\n")
        shown = "".join(lines) or "No document matches."
        return True, False, f"\n\n<information>{shown}</information>\n\n", parsed_action
