"""Exact fractions of integers."""

from .number import Rational, gcd

__all__ = ["Rational", "gcd"]
