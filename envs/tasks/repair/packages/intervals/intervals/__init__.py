"""Half-open intervals of integers: sets of them, and a tree that finds those that overlap."""

from .intervalset import IntervalSet
from .tree import IntervalTree

__all__ = ["IntervalSet", "IntervalTree"]
