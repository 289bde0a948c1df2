"""Branches of a script that do not run with the arguments that it is given."""

from __future__ import annotations

import re
from collections.abc import Sequence

import tree_sitter

from rome.agent.iflow.approval.shell_nodes import all_below, text_of
from rome.agent.iflow.approval.shell_syntax import parse_tree

_ASKS_ARGUMENT = re.compile(r"\[ (\"?)\$([1-9])\1 ==? ([\"']?)([\w./-]+)\3 \]")
# After one of these, the script's arguments may be others.
_CHANGES_ARGUMENTS = frozenset(
    {"set", "shift", "eval", "source", ".", "alias", "command", "builtin", "exec", "trap"}
)


def without_dead_branches(script: str, arguments: Sequence[str]) -> str:
    """Return a script without the branches that its arguments rule out.

    Only those are left out that are certain: at the script's top, of a plain comparison of an
    argument with a fixed text, before anything that could change the arguments.

    Args:
      script: of bash.
      arguments: that it is given.
    """
    root = parse_tree(script)
    if root is None or root.has_error:
        return script
    source = script.encode()
    cuts = []
    for node in root.children:
        if _may_change_arguments(node):
            break
        if node.type == "if_statement" and _is_false(node, arguments):
            cuts.append(_branch_of(node))
    for start, end in reversed(cuts):
        source = source[:start] + b"\n:\n" + source[end:]
    return source.decode()


def _may_change_arguments(node: tree_sitter.Node) -> bool:
    return any(
        one.type == "function_definition"
        or (one.type == "command_name" and text_of(one) in _CHANGES_ARGUMENTS)
        or (one.type == "command_name" and not re.fullmatch(r"[\w./-]+|:|\[", text_of(one)))
        for one in all_below(node)
    )


def _is_false(node: tree_sitter.Node, arguments: Sequence[str]) -> bool:
    condition = node.child_by_field_name("condition")
    asked = _ASKS_ARGUMENT.fullmatch(text_of(condition)) if condition is not None else None
    if asked is None:
        return False
    place = int(asked[2])
    given = arguments[place - 1] if place <= len(arguments) else ""
    return given != asked[4]


def _branch_of(node: tree_sitter.Node) -> tuple[int, int]:
    """Return where the branch behind `then` begins and ends."""
    start = next(one.end_byte for one in node.children if one.type == "then")
    ends = ("elif_clause", "else_clause", "fi")
    return start, next(one.start_byte for one in node.children if one.type in ends)
