"""Small, plausible bugs in Python source.

Each operator finds the places in a syntax tree where it could put a bug, as edits of the text. The
rest of the file stays as it was, comments and layout included. Whether an edit changes the
program's behaviour is decided by its tests (prove.py).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator

_COMPARED = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
}
_COMPUTED = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.FloorDiv: ("//", "*"),
    ast.Div: ("/", "//"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
}
MAX_SOURCE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, order=True)
class Edit:
    """A replacement of text[start:end], in characters from 0; `operator` names the kind of bug."""

    start: int
    end: int
    replacement: str
    operator: str

    def apply(self, source: str) -> str:
        """Return the source with this edit."""
        return source[: self.start] + self.replacement + source[self.end :]


class Source:
    """A module's text and tree, and the place of each node in the text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tree = ast.parse(text)
        self._starts = [0]
        for line in text.encode().split(b"\n"):
            self._starts.append(self._starts[-1] + len(line) + 1)
        self._bytes = text.encode()
        self._ascii = text.isascii()
        self._names: dict[ast.AST, list[str]] = {}
        self.parents = {
            child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)
        }

    def start(self, node: ast.AST) -> int:
        """Return the place where a node begins."""
        return self._place(node.lineno, node.col_offset)

    def end(self, node: ast.AST) -> int:
        """Return the place where a node ends."""
        return self._place(node.end_lineno, node.end_col_offset)

    def of(self, node: ast.AST) -> str:
        """Return the text of a node."""
        return self.text[self.start(node) : self.end(node)]

    def _place(self, line: int, column: int) -> int:
        place = self._starts[line - 1] + column
        return place if self._ascii else len(self._bytes[:place].decode())

    def names(self, scope: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
        """Return the names that a function binds, in order."""
        if scope not in self._names:
            arguments = [
                one.arg
                for one in (*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs)
            ]
            stored = (
                inner.id
                for inner in ast.walk(scope)
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)
            )
            self._names[scope] = [
                name
                for name in dict.fromkeys([*arguments, *stored])
                if name not in ("self", "cls", "_")
            ]
        return self._names[scope]

    def edit(self, operator: str, node: ast.AST, replacement: str) -> Edit:
        """Return the edit that replaces a node."""
        return Edit(self.start(node), self.end(node), replacement, operator)

    def block(self, statements: list[ast.stmt], column: int) -> str:
        """Return the text of statements, moved left to a column."""
        text = self.text[self.start(statements[0]) : self.end(statements[-1])]
        return re.sub(rf"\n {{{statements[0].col_offset - column}}}", "\n", text)


def candidates_of(text: str) -> list[Edit]:
    """Return the edits of all operators in the order of the text.

    Some may give no valid Python, or the same program. Raises SyntaxError.
    """
    source = Source(text)
    found = set()
    for node in _mutable(source.tree):
        for operator, places in OPERATORS.items():
            for edit in places(source, node):
                found.add(dataclasses.replace(edit, operator=operator))
    return sorted(found)


def is_another_program(text: str, edit: Edit) -> bool:
    """Return whether the edit gives a module that parses and differs in more than its layout."""
    try:
        return ast.dump(ast.parse(edit.apply(text))) != _dump(text)
    except (SyntaxError, ValueError, RecursionError):
        return False


@functools.lru_cache(maxsize=64)
def _dump(text: str) -> str:
    return ast.dump(ast.parse(text))


def _mutable(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that a bug may be put into.

    Left out are nodes without an effect at run time (docstrings, annotations, imports) and nodes
    without an exact place (inside f-strings).
    """
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        yield node
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "type_params", "type_comment"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if not isinstance(child, ast.AST) or isinstance(
                    child, (ast.JoinedStr, ast.Import, ast.ImportFrom)
                ):
                    continue
                if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                    continue
                if (
                    isinstance(child, ast.Assign)
                    and isinstance(child.targets[0], ast.Name)
                    and child.targets[0].id.startswith("__")
                ):
                    continue
                if (
                    isinstance(child, ast.If)
                    and isinstance(child.test, ast.Compare)
                    and isinstance(child.test.left, ast.Name)
                    and child.test.left.id == "__name__"
                ):
                    continue
                stack.append(child)


# -- the operators: (source, node) -> edits, none where they do not apply
# -------------------------------------------------------------------------------------------------


def _token(source: Source, left: ast.AST, right: ast.AST, old: str, new: str) -> Iterator[Edit]:
    """Yield the edit of the operator between two operands."""
    start = source.end(left)
    end = source.start(right)
    gap = source.text[start:end]
    pattern = (
        r"\s+".join(rf"\b{word}\b" for word in old.split()) if old[0].isalpha() else re.escape(old)
    )
    if "#" not in gap and (match := re.search(pattern, gap)):
        yield Edit(start + match.start(), start + match.end(), new, "")


def comparison(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Change a comparison: < to <=, == to !=, and so on."""
    if isinstance(node, ast.Compare):
        for left, operator, right in zip(
            [node.left, *node.comparators], node.ops, node.comparators, strict=False
        ):
            yield from _token(source, left, right, *_COMPARED[type(operator)])


def arithmetic(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Change an arithmetic operator."""
    if isinstance(node, ast.BinOp) and type(node.op) in _COMPUTED:
        yield from _token(source, node.left, node.right, *_COMPUTED[type(node.op)])
    if isinstance(node, ast.AugAssign) and type(node.op) in _COMPUTED:
        old, new = _COMPUTED[type(node.op)]
        yield from _token(source, node.target, node.value, f"{old}=", f"{new}=")


def connective(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Exchange `and` and `or`."""
    if isinstance(node, ast.BoolOp):
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        yield from _token(source, node.values[-2], node.values[-1], old, new)


def negation(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Negate a condition, or remove its negation."""
    if isinstance(node, (ast.If, ast.IfExp)):
        test = node.test
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            yield source.edit("", test, source.of(test.operand))
        elif isinstance(test, (ast.Name, ast.Call, ast.Attribute, ast.Subscript)):
            yield source.edit("", test, f"not {source.of(test)}")
        elif isinstance(test, ast.BoolOp):
            yield source.edit("", test, f"not ({source.of(test)})")


def off_by_one(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Change a small integer, a length or a range by one."""
    if isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 1000:
        for change in (1, -1):
            if node.value + change >= 0:
                yield source.edit("", node, str(node.value + change))
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("len", "range")
        and len(node.args) == 1
        and not isinstance(node.args[0], ast.Starred)
    ):
        yield source.edit(
            "",
            node,
            (
                f"{source.of(node)} - 1"
                if node.func.id == "len"
                else f"range(1, {source.of(node.args[0])})"
            ),
        )


def wrong_constant(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Change a constant: negate a boolean, shorten a text, increase a float."""
    if not isinstance(node, ast.Constant):
        return
    if isinstance(node.value, bool):
        yield source.edit("", node, str(not node.value))
    elif (
        isinstance(node.value, str)
        and source.of(node)[:1] in "'\""
        and len(node.value) <= 40
        and node.value.isprintable()
    ):
        yield source.edit("", node, repr(node.value[:-1] if node.value else " "))
    elif isinstance(node.value, float) and abs(node.value) < 1e9:
        yield source.edit("", node, repr(node.value + 1))


def wrong_variable(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Use another variable of the same function: the one bound before or after this one."""
    if not isinstance(node, ast.Name) or not isinstance(node.ctx, ast.Load):
        return
    scope = source.parents.get(node)
    while scope is not None and not isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef)):
        scope = source.parents.get(scope)
    if scope is None:
        return
    names = source.names(scope)
    if node.id in names and len(names) > 1:
        place = names.index(node.id)
        for other in {names[place - 1], names[(place + 1) % len(names)]} - {node.id}:
            yield source.edit("", node, other)


def dropped_return(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Drop the `return` of a returned value."""
    if (
        isinstance(node, ast.Return)
        and node.value is not None
        and not isinstance(node.value, ast.Constant)
    ):
        start = source.start(node)
        yield Edit(start, start + len("return") + (source.text[start + 6] == " "), "", "")


def swapped_arguments(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Swap two neighbouring arguments of a call."""
    if isinstance(node, ast.Call):
        for first, second in itertools.pairwise(node.args):
            if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
                between = source.text[source.end(first) : source.start(second)]
                yield Edit(
                    source.start(first),
                    source.end(second),
                    source.of(second) + between + source.of(first),
                    "",
                )


def removed_branch(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Remove a branch of an `if`."""
    if not isinstance(node, ast.If):
        return
    elif_ = source.text.startswith("elif", source.start(node))
    if not node.orelse:
        yield source.edit(
            "", node, f"else:\n{' ' * (node.col_offset + 4)}pass" if elif_ else "pass"
        )
    elif isinstance(node.orelse[0], ast.If) and source.text.startswith(
        "elif", source.start(node.orelse[0])
    ):
        yield Edit(
            source.start(node), source.start(node.orelse[0]) + (0 if elif_ else 2), "", ""
        )  # `elif` goes on as it is, or becomes `if`
    elif not elif_:
        yield source.edit("", node, source.block(node.orelse, node.col_offset))


def removed_handler(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Remove the exception handlers of a `try`."""
    if isinstance(node, ast.Try) and node.handlers and not node.finalbody and not node.orelse:
        yield source.edit("", node, source.block(node.body, node.col_offset))


def removed_statement(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Remove an augmented assignment or a call."""
    if isinstance(node, ast.AugAssign) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield source.edit("", node, "pass")


def loop_exit(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Exchange `break` and `continue`."""
    if isinstance(node, (ast.Break, ast.Continue)):
        yield source.edit("", node, "continue" if isinstance(node, ast.Break) else "break")


def lost_slice(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Drop a bound of a slice."""
    if isinstance(node, ast.Slice):
        for bound in (node.lower, node.upper):
            if bound is not None:
                yield source.edit("", bound, "")


def keyword_lost(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Drop the last argument of a call if it is a keyword."""
    if (
        isinstance(node, ast.Call)
        and node.keywords
        and node.keywords[-1].arg
        and (len(node.keywords) > 1 or node.args)
    ):
        before = node.keywords[-2] if len(node.keywords) > 1 else node.args[-1]
        if source.end(before) <= source.start(node.keywords[-1]):
            yield Edit(source.end(before), source.end(node.keywords[-1]), "", "")


OPERATORS: dict[str, Callable[[Source, ast.AST], Iterator[Edit]]] = {
    function.__name__: function
    for function in (
        comparison,
        arithmetic,
        connective,
        negation,
        off_by_one,
        wrong_constant,
        wrong_variable,
        dropped_return,
        swapped_arguments,
        removed_branch,
        removed_handler,
        removed_statement,
        loop_exit,
        lost_slice,
        keyword_lost,
    )
}
