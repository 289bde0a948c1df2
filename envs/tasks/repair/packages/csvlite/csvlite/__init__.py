"""Comma-separated values: rows of text in and out, with quotes as RFC 4180 has them."""

from .reader import CsvError, parse
from .table import Table
from .writer import render

__all__ = ["CsvError", "Table", "parse", "render"]
