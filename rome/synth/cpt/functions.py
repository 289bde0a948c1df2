"""Functions in Python sources: where their bodies lie, and sources without some of them."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable

Node = ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True)
class Function:
    """A function or method that is not inside another one.

    Attributes:
      name: with its class, as in "Table.rows".
      first: its first line, decorators included.
      body: first line of its body, after the docstring.
      last: its last line.
      indent: blanks before its body.
    """

    name: str
    first: int
    body: int
    last: int
    indent: str


def functions_of(text: str) -> list[Function]:
    """Return the functions of a source whose bodies have lines of their own; [] for no Python."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    lines = text.split("\n")
    found: list[Function] = []

    def visit(body: Iterable[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                function = _function_of(node, prefix, lines)
                if function is not None:
                    found.append(function)

    visit(tree.body, "")
    return found


def _function_of(node: Node, prefix: str, lines: list[str]) -> Function | None:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    body = node.body
    if len(body) > 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    start = min([body[0].lineno, *(_decorator_lines(body[0]))])
    last = node.end_lineno or node.lineno
    before = lines[start - 1][: body[0].col_offset]
    if start <= node.lineno or before.strip() or lines[start - 2].rstrip().endswith("\\"):
        return None  # on one line with its head, or with its docstring
    return Function(f"{prefix}{node.name}", first, start, last, before)


def _decorator_lines(node: ast.stmt) -> list[int]:
    return [decorator.lineno for decorator in getattr(node, "decorator_list", [])]


def without_bodies(text: str, functions: Iterable[Function]) -> str:
    """Return a source in which these functions only raise NotImplementedError."""
    lines = text.split("\n")
    for function in sorted(functions, key=lambda one: -one.first):
        stub = f"{function.indent}raise NotImplementedError"
        lines[function.body - 1 : function.last] = [stub]
    return "\n".join(lines)


def source_of(text: str, name: str) -> str:
    """Return the lines of a function or method; "" where there is none of that name."""
    for function in functions_of(text):
        if function.name == name:
            return "\n".join(text.split("\n")[function.first - 1 : function.last]) + "\n"
    return ""
