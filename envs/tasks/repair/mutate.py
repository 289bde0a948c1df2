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

# Operator in the tree -> its text, and the text of the wrong operator.
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
# Fields of a syntax tree that have no effect when the program runs.
_WITHOUT_EFFECT = ("annotation", "returns", "decorator_list", "type_params", "type_comment")


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
        self._bytes = text.encode()
        self._is_ascii = text.isascii()
        self._line_starts = [0]  # in bytes, as the tree counts columns
        for line in self._bytes.split(b"\n"):
            self._line_starts.append(self._line_starts[-1] + len(line) + 1)
        self._names: dict[ast.AST, list[str]] = {}
        self.parents: dict[ast.AST, ast.AST] = {}
        for node in ast.walk(self.tree):
            for child in ast.iter_child_nodes(node):
                self.parents[child] = node

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
        place = self._line_starts[line - 1] + column
        return place if self._is_ascii else len(self._bytes[:place].decode())

    def names(self, scope: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
        """Return the names that a function binds, in order."""
        if scope not in self._names:
            bound = [*_argument_names(scope), *_stored_names(scope)]
            distinct = dict.fromkeys(bound)
            self._names[scope] = [name for name in distinct if name not in ("self", "cls", "_")]
        return self._names[scope]

    def edit(self, operator: str, node: ast.AST, replacement: str) -> Edit:
        """Return the edit that replaces a node."""
        return Edit(self.start(node), self.end(node), replacement, operator)

    def block(self, statements: list[ast.stmt], column: int) -> str:
        """Return the text of statements, moved left to a column."""
        text = self.text[self.start(statements[0]) : self.end(statements[-1])]
        surplus = statements[0].col_offset - column
        return re.sub(rf"\n {{{surplus}}}", "\n", text)


def _argument_names(scope: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = (*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs)
    return [argument.arg for argument in arguments]


def _stored_names(scope: ast.AST) -> Iterator[str]:
    for node in ast.walk(scope):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def candidates_of(text: str) -> list[Edit]:
    """Return the edits of all operators in the order of the text.

    Some may give no valid Python, or the same program. Raises SyntaxError.
    """
    source = Source(text)
    found = set()
    for node in _mutable(source.tree):
        for name, operator in OPERATORS.items():
            for edit in operator(source, node):
                found.add(dataclasses.replace(edit, operator=name))
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
            if name in _WITHOUT_EFFECT:
                continue
            children = value if isinstance(value, list) else [value]
            stack += [child for child in children if _is_mutable(child)]


def _is_mutable(node: object) -> bool:
    """Return whether a field's entry is a node that may hold a bug."""
    if not isinstance(node, ast.AST):
        return False
    if isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom)):
        return False
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)  # a docstring
    if isinstance(node, ast.Assign):
        target = node.targets[0]  # such as __all__ and __version__
        return not (isinstance(target, ast.Name) and target.id.startswith("__"))
    if isinstance(node, ast.If) and isinstance(node.test, ast.Compare):
        left = node.test.left
        return not (isinstance(left, ast.Name) and left.id == "__name__")
    return True


# -- Operators: (source, node) -> edits, none where the operator does not apply
# -------------------------------------------------------------------------------------------------


def _token(source: Source, left: ast.AST, right: ast.AST, old: str, new: str) -> Iterator[Edit]:
    """Yield the edit of the operator between two operands."""
    start = source.end(left)
    gap = source.text[start : source.start(right)]
    if "#" in gap:
        return
    if old[0].isalpha():
        pattern = r"\s+".join(rf"\b{word}\b" for word in old.split())
    else:
        pattern = re.escape(old)
    if match := re.search(pattern, gap):
        yield Edit(start + match.start(), start + match.end(), new, "")


def comparison(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Change a comparison: < to <=, == to !=, and so on."""
    if not isinstance(node, ast.Compare):
        return
    left = node.left
    for operator, right in zip(node.ops, node.comparators, strict=True):
        old, new = _COMPARED[type(operator)]
        yield from _token(source, left, right, old, new)
        left = right


def arithmetic(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Change an arithmetic operator."""
    if not isinstance(node, (ast.BinOp, ast.AugAssign)) or type(node.op) not in _COMPUTED:
        return
    old, new = _COMPUTED[type(node.op)]
    if isinstance(node, ast.BinOp):
        yield from _token(source, node.left, node.right, old, new)
    else:
        yield from _token(source, node.target, node.value, f"{old}=", f"{new}=")


def connective(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Exchange `and` and `or`."""
    if not isinstance(node, ast.BoolOp):
        return
    old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
    yield from _token(source, node.values[-2], node.values[-1], old, new)


def negation(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Negate a condition, or remove its negation."""
    if not isinstance(node, (ast.If, ast.IfExp)):
        return
    test = node.test
    text = source.of(test)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yield source.edit("", test, source.of(test.operand))
    elif isinstance(test, (ast.Name, ast.Call, ast.Attribute, ast.Subscript)):
        yield source.edit("", test, f"not {text}")
    elif isinstance(test, ast.BoolOp):
        yield source.edit("", test, f"not ({text})")


def off_by_one(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Change a small integer, a length or a range by one."""
    if isinstance(node, ast.Constant):
        yield from _shifted_integer(source, node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 1:
        yield from _shifted_length(source, node, node.func.id, node.args[0])


def _shifted_integer(source: Source, node: ast.Constant) -> Iterator[Edit]:
    number = node.value
    if type(number) is not int or abs(number) >= 1000:
        return
    for shifted in (number + 1, number - 1):
        if shifted >= 0:
            yield source.edit("", node, str(shifted))


def _shifted_length(
    source: Source, node: ast.Call, function: str, argument: ast.expr
) -> Iterator[Edit]:
    if isinstance(argument, ast.Starred):
        return
    if function == "len":
        yield source.edit("", node, f"{source.of(node)} - 1")
    if function == "range":
        yield source.edit("", node, f"range(1, {source.of(argument)})")


def wrong_constant(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Change a constant: negate a boolean, shorten a text, increase a float."""
    if not isinstance(node, ast.Constant):
        return
    value = node.value
    if isinstance(value, bool):
        yield source.edit("", node, str(not value))
    elif isinstance(value, str):
        has_plain_quotes = source.of(node)[:1] in "'\""
        if has_plain_quotes and len(value) <= 40 and value.isprintable():
            yield source.edit("", node, repr(value[:-1] if value else " "))
    elif isinstance(value, float) and abs(value) < 1e9:
        yield source.edit("", node, repr(value + 1))


def wrong_variable(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Use another variable of the same function: the one bound before or after this one."""
    if not isinstance(node, ast.Name) or not isinstance(node.ctx, ast.Load):
        return
    scope = _function_around(source, node)
    names = source.names(scope) if scope is not None else []
    if node.id not in names:
        return
    place = names.index(node.id)
    neighbours = {names[place - 1], names[(place + 1) % len(names)]}
    for other in neighbours - {node.id}:
        yield source.edit("", node, other)


def _function_around(
    source: Source, node: ast.AST
) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    scope = source.parents.get(node)
    while scope is not None and not isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef)):
        scope = source.parents.get(scope)
    return scope


def dropped_return(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Drop the `return` of a returned value."""
    if not isinstance(node, ast.Return) or node.value is None:
        return
    if not isinstance(node.value, ast.Constant):
        start = source.start(node)
        end = start + len("return")
        if source.text[end] == " ":
            end += 1
        yield Edit(start, end, "", "")


def swapped_arguments(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Swap two neighbouring arguments of a call."""
    if not isinstance(node, ast.Call):
        return
    for first, second in itertools.pairwise(node.args):
        if isinstance(first, ast.Starred) or isinstance(second, ast.Starred):
            continue
        between = source.text[source.end(first) : source.start(second)]
        swapped = source.of(second) + between + source.of(first)
        yield Edit(source.start(first), source.end(second), swapped, "")


def removed_branch(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Remove a branch of an `if`."""
    if not isinstance(node, ast.If):
        return
    is_elif = _is_elif(source, node)
    if not node.orelse:
        indent = " " * (node.col_offset + 4)
        yield source.edit("", node, f"else:\n{indent}pass" if is_elif else "pass")
    elif isinstance(node.orelse[0], ast.If) and _is_elif(source, node.orelse[0]):
        # The following `elif` stays as it is, or becomes `if`.
        kept_from = source.start(node.orelse[0]) + (0 if is_elif else len("el"))
        yield Edit(source.start(node), kept_from, "", "")
    elif not is_elif:
        yield source.edit("", node, source.block(node.orelse, node.col_offset))


def _is_elif(source: Source, node: ast.AST) -> bool:
    return source.text.startswith("elif", source.start(node))


def removed_handler(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Remove the exception handlers of a `try`."""
    if isinstance(node, ast.Try) and node.handlers and not node.finalbody and not node.orelse:
        yield source.edit("", node, source.block(node.body, node.col_offset))


def removed_statement(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Remove an augmented assignment or a call."""
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if is_call or isinstance(node, ast.AugAssign):
        yield source.edit("", node, "pass")


def loop_exit(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Exchange `break` and `continue`."""
    if isinstance(node, (ast.Break, ast.Continue)):
        yield source.edit("", node, "continue" if isinstance(node, ast.Break) else "break")


def lost_slice(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Drop a bound of a slice."""
    if not isinstance(node, ast.Slice):
        return
    for bound in (node.lower, node.upper):
        if bound is not None:
            yield source.edit("", bound, "")


def keyword_lost(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Drop the last argument of a call if it is a keyword."""
    if not isinstance(node, ast.Call) or not node.keywords or not node.keywords[-1].arg:
        return
    *others, last = [*node.args, *node.keywords]
    if not others:
        return
    start = source.end(others[-1])
    if start <= source.start(last):
        yield Edit(start, source.end(last), "", "")


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
