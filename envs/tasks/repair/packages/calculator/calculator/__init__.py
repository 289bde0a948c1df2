"""Arithmetic in text: tokens, a parser, an evaluator."""

from .evaluate import evaluate
from .parser import parse
from .tokens import SyntaxFault, tokenize

__all__ = ["SyntaxFault", "evaluate", "parse", "tokenize"]
