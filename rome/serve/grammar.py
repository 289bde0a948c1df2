"""Answers that follow a schema, a regular expression or a grammar, by the package llguidance.

The package is optional.
A grammar says which tokens may come next; it reads every token that is drawn, so it follows on the
host, between two calls.

V vocabulary, W words of 32 bits: token v is bit v % 32 of word v // 32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from rome.model.tokenizer import Tokenizer
from rome.serve.checks import BadRequest

KINDS = ("json_schema", "regex", "ebnf")  # sampling parameters, of which a request may give one


class Grammar:
    """What an answer must be, and how far it has come.

    Args:
      matcher: of llguidance.
    """

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def allowed(self) -> np.ndarray:
        """Return the tokens that may come next, [W] int32."""
        return np.frombuffer(self._matcher.compute_bitmask(), np.int32)

    def take(self, tokens: Sequence[int]) -> str:
        """Go on by the tokens that were drawn; return what is wrong, or "" if nothing is."""
        self._matcher.consume_tokens(list(tokens))
        return str(self._matcher.get_error())

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow but an end token."""
        return bool(self._matcher.is_stopped())


def make_grammar(
    kind: str, text: str, tokenizer: Any, vocab_size: int, end_ids: frozenset[int]
) -> Grammar:
    """Return the grammar of an answer that has not begun.

    Args:
      kind: of KINDS.
      text: a JSON schema, a regular expression that the whole answer matches, or a grammar of the
        whole answer: GBNF from its rule `root` on, or llguidance's Lark from `start` on.
      tokenizer: of the model; None for a server without one.
      vocab_size: of the model.
      end_ids: tokens that may end an answer which is complete.

    Raises:
      BadRequest: the text is no such thing, or there is no tokenizer or no llguidance here.
    """
    llguidance = _import(kind)
    if not isinstance(tokenizer, Tokenizer):
        raise BadRequest(
            f"this server has no tokenizer (--skip_tokenizer_init), so it cannot follow a {kind}"
        )
    try:
        source = llguidance.grammar_from(kind, text)
    except ValueError as error:  # of JSON that is no object, and of GBNF
        raise BadRequest(f"{kind} cannot be followed: {error}") from None
    matcher = llguidance.LLMatcher(_read_tokenizer(tokenizer, vocab_size, end_ids), source)
    if matcher.is_error():
        raise BadRequest(f"{kind} cannot be followed: {matcher.get_error()[:500]}")
    return Grammar(matcher)


@functools.lru_cache(maxsize=1)
def _read_tokenizer(tokenizer: Tokenizer, vocab_size: int, end_ids: frozenset[int]) -> Any:
    """Return llguidance's view of a tokenizer, which takes a second for a large one."""
    ends = sorted(token for token in end_ids if 0 <= token < vocab_size)
    return _import("grammar").LLTokenizer(
        tokenizer.to_json(), n_vocab=vocab_size, eos_token=ends or None
    )


def _import(kind: str) -> Any:
    try:
        import llguidance
    except ImportError:
        raise BadRequest(
            f"{kind} needs the package llguidance where the engine runs: pip install -r"
            " requirements-grammar.txt"
        ) from None
    return llguidance
